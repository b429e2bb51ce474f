"""Packed models for others: `python -m lbllm_core.export --format bf16|packed --out FOLDER [--model-dir FOLDER]`, or `make export`.

* `bf16`: an ordinary transformers checkpoint with the dequantized weights, for engines that do not know the packed format. It is as large
  as any bf16 model, and its activations are *not* quantized: it is the packed model's weights, not the packed model. It is opened
  again and compared twice: every weight must be the packed one, rounded once; and the logits of the packed model with activations left
  alone (its A16 view) against the checkpoint's own, both in fp32 arithmetic. What lies between those is the rounding of weights
  to bf16 (relative 2^-9, about 50 dB a weight, about 40 dB in the logits of 30 blocks); below MIN_SQNR_DB nothing is kept.
* `packed`: a copy of the packed folder whose card holds the figures that were measured on its bytes.

The folder is built beside its place and renamed into it. One that exists is never touched.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lbllm_core.engine.artifacts import home_folder, prepare_home, read_manifest
from lbllm_core.errors import ArtifactError, GateError, LbllmError
from lbllm_core.model.card import Result, with_results
from lbllm_core.newest import finished, packed_folder

MIN_SQNR_DB = 30.0
CHECK_TOKENS = 64
CARD = "README.md"
FORMATS = ("bf16", "packed")


def built(target: Path, build: Callable[[Path], str]) -> str:
    """`build(empty folder)`, renamed to `target` when it succeeded; its sentence. Raises ArtifactError when `target` exists or cannot be."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ArtifactError(f"{target} exists already; choose another OUT")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
    except OSError as error:
        raise ArtifactError(f"cannot write into {target.parent} ({error.strerror}); choose another OUT") from error
    try:
        said = build(part)
        if target.exists():
            target.rmdir()
        part.chmod(0o755)
        for path in part.iterdir():
            path.chmod(0o644)
        part.rename(target)
    except OSError as error:
        raise ArtifactError(f"cannot write {target} ({error.strerror or error}); make room or choose another OUT") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return said


def export_bf16(packed: Path, folder: Path) -> str:
    """Write and verify the dequantized checkpoint. Raises GateError when its logits are not the packed model's."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from lbllm_core.evaluation.packed_check import sqnr_db
    from lbllm_core.model.packed_folder import load_packed, load_tokenizer, read_scheme

    disable_progress_bar()
    scheme = read_scheme(packed)
    plain = dequantized(packed)
    plain.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = load_tokenizer(packed, optional=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    del plain
    ids = torch.randint(0, vocabulary_of(packed), (1, CHECK_TOKENS), generator=torch.Generator().manual_seed(0))
    view = load_packed(packed, activations=False)
    reopened = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False).eval()
    _compare_weights(view, reopened)
    with torch.no_grad():
        db = sqnr_db(view(ids, use_cache=False).logits, reopened(ids, use_cache=False).logits)
    if not db >= MIN_SQNR_DB:
        raise GateError(f"the exported checkpoint is {db:.1f} dB from the packed model with unquantized activations, below {MIN_SQNR_DB:g}; nothing was written, please report this")
    act = "its activations are quantized to 4 bits at run time and these are not" if scheme.act_bits < 16 else "its activations are not quantized either"
    note = (
        f"# Dequantized checkpoint\n\nThe weights of a model that LBLLM packed to W(1+1), written out as bf16 for engines without the packed format. It is not the packed model: {act}, "
        f"so figures of the packed model do not hold here.\nIt takes 16 bits a weight and gains nothing in speed.\n\nVerified when it was made: logits {min(db, 999):.1f} dB above the difference to the packed "
        f"weights in fp32 on {CHECK_TOKENS} tokens (at least {MIN_SQNR_DB:g} is asked).\n"
    )
    original = (packed / CARD).read_text(encoding="utf-8") if (packed / CARD).is_file() else ""
    front, body = _front_matter(original)
    (folder / CARD).write_text(front + note + (f"\n---\n\nThe card of the packed model:\n\n{body}" if body else ""), encoding="utf-8")
    return f"logits {min(db, 999):.1f} dB above the difference to the packed weights (at least {MIN_SQNR_DB:g}); activations are not quantized there"


def _compare_weights(view: Any, reopened: Any) -> None:
    """GateError naming the first linear of the checkpoint that is not the packed one, rounded to bf16."""
    import torch
    from lbllm_kernels.format import dequantize

    from lbllm_core.model.packed import packed_linears

    for name, linear in packed_linears(view):
        if not torch.equal(reopened.get_submodule(name).weight, dequantize(linear.packed()).to(torch.bfloat16).float()):
            raise GateError(f"the exported checkpoint's {name} is not the packed weight; nothing was written, please report this")


def vocabulary_of(packed: Path) -> int:
    """Vocabulary of a packed folder."""
    return int(json.loads((packed / "config.json").read_text(encoding="utf-8"))["vocab_size"])


def dequantized(packed: Path) -> Any:
    """An ordinary transformers model in fp32 with the packed model's weights."""
    import torch
    from lbllm_kernels.format import dequantize
    from torch import nn

    from lbllm_core.model.packed import packed_linears
    from lbllm_core.model.packed_folder import load_packed

    model = load_packed(packed, keep_16_bits=False)
    for name, linear in list(packed_linears(model)):
        weight = dequantize(linear.packed())
        plain = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if linear.bias is not None:
            plain.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
    for block in model.model.layers:
        del block.act_sites
    model.config = copy.deepcopy(model.config)
    for owner in (model.config, model, model.model):
        for attribute in ("quantization_config", "hf_quantizer", "quantization_method"):
            if getattr(owner, attribute, None) is not None:
                delattr(owner, attribute)
    model.config.dtype = torch.bfloat16
    return model


def _front_matter(text: str) -> tuple[str, str]:
    """A card's YAML head (with its marks) and the rest."""
    if not text.startswith("---\n") or "\n---\n" not in text[4:]:
        return "", text
    head, _, body = text[4:].partition("\n---\n")
    return f"---\n{head}\n---\n", body


def export_packed(packed: Path, folder: Path, home: Path) -> str:
    """Copy a packed folder; its card gets the results that were measured on it."""
    from lbllm_core.model.packed_folder import load_packed

    load_packed(packed)  # nothing is passed on that does not load
    for path in packed.iterdir():
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    results = measured(packed, home)
    card = folder / CARD
    if not results or not card.is_file():
        return "no evaluation of this model in the home folder, so its card has no results"
    source = "One run, one seed; the protocol's name says text, window and number of examples. Measured on these very files by the pipeline that made them."
    card.write_text(with_results(card.read_text(encoding="utf-8"), results, source), encoding="utf-8")
    return f"its card has {len(results)} measured figures"


def measured(packed: Path, home: Path) -> list[Result]:
    """Figures of `evaluate_model` on the artifact that holds `packed`, with the teacher's beside them; empty when there are none."""
    try:
        digest = read_manifest(packed.parent)["handle"]["digest"]
    except (ArtifactError, KeyError):
        return []
    for _, manifest in finished(home, "evaluate_model"):
        upstream = manifest.get("upstream", {})
        if upstream.get("packed", {}).get("digest") == digest:
            teacher_digest = upstream.get("teacher", {}).get("digest")
            teachers = [m["handle"]["metrics"] for _, m in finished(home, "evaluate_teacher") if m["handle"]["digest"] == teacher_digest]
            teacher = teachers[0] if teachers else {}
            return [Result(name, value, teacher.get(name)) for name, value in manifest["handle"]["metrics"].items()]
    return []


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lbllm_core.export", description="Write a packed model for other engines or other people.")
    parser.add_argument("--format", default="bf16", help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("--out", required=True, type=Path, help="folder to make; must not exist")
    parser.add_argument("--model-dir", default="", help="packed folder (default: the newest of LBLLM_HOME)")
    parser.add_argument("--home", type=Path, help="home folder (default: LBLLM_HOME, else .lbllm)")
    chosen = parser.parse_args(arguments)
    if chosen.format not in FORMATS:
        parser.error(f"--format {chosen.format} is not known; choose one of {', '.join(FORMATS)}")
    try:
        home = prepare_home(chosen.home) if chosen.home else home_folder()
        packed = packed_folder(home, chosen.model_dir)
        out = chosen.out.expanduser()
        said = built(out, lambda part: export_bf16(packed, part) if chosen.format == "bf16" else export_packed(packed, part, home))
    except LbllmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{out}: {chosen.format} of {packed}; {said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
