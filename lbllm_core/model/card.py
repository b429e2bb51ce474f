"""The model card of a packed folder: what it is, what it costs, how it was made, how to load it, what it is not.

A packed folder is an artifact: its files are hashed when its step ends, before anything is evaluated. So the card that packing writes
holds what is known then, and says where figures come from. `make export FORMAT=packed` copies the folder and writes the card
again with the table of results that later steps measured on those very bytes (`lbllm_core/export.py`).

Pure text: values in, Markdown out, no time stamps, so that the same model gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lbllm_core.quant.bits import Bits

LOAD = """```python
import lbllm_core
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
out = model.generate(**tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=32)
print(tokenizer.decode(out[0]))
```"""
RESULTS_FROM = "<!-- results -->"


@dataclass(frozen=True)
class Origin:
    """Where a packed model comes from. Empty strings: not known."""

    name: str = ""
    base: str = ""  # what the teacher was read from
    license: str = ""  # of the base model
    data: str = ""  # calibration text
    recipe: Mapping[str, str] = field(default_factory=dict)  # stage -> its settings, for the stages that ran


@dataclass(frozen=True)
class Result:
    """One measured figure beside the teacher's. `protocol`: the metric's name, which says how it was measured."""

    protocol: str
    value: float
    teacher: float | None = None


def card(origin: Origin, scheme: Mapping[str, object], bits: Bits, sizes: Mapping[str, int], rounded: Mapping[str, float], total_bytes: int) -> str:
    """README.md of a packed folder. `scheme`: `PackedScheme.to_dict()`. `sizes`: bytes of the tensors by part, `rounded`: SQNR in dB."""
    name = origin.name or "a language model"
    base = origin.base or "a model whose source was not recorded"
    form = f"{scheme['level_mode']} levels, groups of {scheme['group_size']}"
    lines = [
        "---",
        f"license: {origin.license.lower() if origin.license else 'unknown'}",
        *([f"base_model: {origin.base}"] if origin.base else []),
        "library_name: transformers",
        "tags: [lbllm, binarized, 2-bit]",
        "---",
        f"# {name}, binarized to W(1+1)A{scheme['act_bits']}",
        "",
        f"One bit and one bitmap bit a weight, {_activations(scheme)}: made by LBLLM from {base}. Weights: {form}; {bits.effective_bpw:.3f} bits a weight with",
        f"everything counted; {total_bytes / 1e6:.1f} MB of tensors. Needs the `lbllm` package: other engines do not know the format (`make export FORMAT=bf16` is for them).",
        "",
        "## Load and generate",
        "",
        LOAD,
        "",
        "No code comes with this folder or is run from it: JSON and safetensors only.",
        "",
        "## Results",
        "",
        RESULTS_FROM,
        "Not part of this folder: a packed model is measured after it is packed. The step `evaluate_model` of the run that made it has the figures;",
        "`make export FORMAT=packed` writes them here.",
        RESULTS_FROM,
        "",
        "## Bits",
        "",
        "| bits a weight of the linear layers | |",
        "|---|---:|",
        *[f"| {item.replace('_', ' ')} | {value:.4f} |" for item, value in bits.per_weight().items()],
        f"| all | {bits.effective_bpw:.4f} |",
        "",
        "| MB | |",
        "|---|---:|",
        *[f"| {part} | {size / 1e6:.2f} |" for part, size in sizes.items()],
        f"| all tensors | {total_bytes / 1e6:.2f} |",
        *[f"\n`{tensor}` is rounded to fp16 ({db:.1f} dB above the rounding error)." for tensor, db in rounded.items()],
        "",
        "## Recipe",
        "",
        f"Calibration text: {origin.data or 'not recorded'}.",
        "",
        *([f"- `{stage}`: {settings}" for stage, settings in origin.recipe.items()] or ["Stages: not recorded."]),
        "",
        "## Licence",
        "",
        f"The base model's licence applies to these weights: {origin.license or 'not recorded; ask whoever gave you the base model'}.",
        "",
        "## Limits",
        "",
        "- A quantized model knows less than its teacher; look at the results before using it, on your own task.",
        "- Faults and biases of the base model are still there, and were not examined.",
        "- For inference only: gradients are refused. Activations are quantized at run time, so results of other engines on dequantized weights differ.",
        f"- Keys and values of the cache: {scheme['kv_bits']} bits.",
        "",
    ]
    return "\n".join(lines)


def _activations(scheme: Mapping[str, object]) -> str:
    if scheme["act_bits"] == 16:
        return "16-bit activations"
    apart = f", {scheme['outlier_channels']} channels of each input in 8 bits, weights and activations" if scheme.get("outlier_channels") else ""
    return f"{scheme['act_bits']}-bit activations ({scheme['act_variant']} codes){apart}"


def with_results(text: str, results: Sequence[Result], source: str) -> str:
    """A card with its table of results. `source`: one sentence on where they come from."""
    before, _, after = text.partition(RESULTS_FROM)
    rest = after.partition(RESULTS_FROM)[2]
    rows = ["| protocol | teacher | this model |", "|---|---:|---:|"]
    rows += [f"| `{r.protocol}` | {'' if r.teacher is None else f'{r.teacher:.4g}'} | {r.value:.4g} |" for r in results]
    return f"{before}{chr(10).join([*rows, '', source])}{rest}"
