"""Where four-bit activations cost: `python -m lbllm_core.evaluation.site_costs [--model-dir FOLDER] [--protocol ppl_wikitext2_s2048] [--out FILE]`.

A block has four places where activations are quantized (*sites*: before q, k and v; before o; before gate and up; before down). The packed
model is evaluated with all of them in four bits, as it is, with none, with each one alone, and with each one alone left out. Nothing is trained
in between, so a row says what the site costs *this* model, whose weights have learned to live with all four; the costs of single
sites need not add up to the cost of all.

The sites that are left out take their input as it is, in the model's type. Windows are the first ones of a protocol.

One row more says what a finer scale would buy: each run of 64 channels, at all sites, has a scale and a zero point of its own. That is emulated (uniform
codes, nothing clipped): it has no packed form. The figures are printed; with `--out` they also go into a results file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lbllm_kernels.activation import ActFactors
from torch import Tensor, nn

from lbllm_core.config import ModelConfig, RunConfig
from lbllm_core.engine.artifacts import home_folder
from lbllm_core.engine.hardware import resolve
from lbllm_core.errors import ArtifactError, LbllmError, ModelError
from lbllm_core.evaluation.decode_record import teacher_config
from lbllm_core.evaluation.perplexity import forward_of, metric_name, perplexity, windows
from lbllm_core.model.blocks import SITES
from lbllm_core.model.packed import ActSite, packed_linears
from lbllm_core.newest import packed_folder, run_of, run_options
from lbllm_core.quant.activation import ActQuantizer

NONE, ALL, GROUPED = "none", "all", "all per group"
CHANNELS = 64  # that share a scale in the last of these


@contextmanager
def quantized_at(model: nn.Module, sites: Set[str]) -> Iterator[None]:
    """Inside, a packed model rounds the activations of these sites alone; after it, of those that it came with."""
    placed = [(name.rpartition(".")[2], module, module.variant) for name, module in model.named_modules() if isinstance(module, ActSite)]
    try:
        _set(model, [(site, variant if name in sites else "none") for name, site, variant in placed])
        yield
    finally:
        _set(model, [(site, variant) for _, site, variant in placed])


def _set(model: nn.Module, variants: Sequence[tuple[ActSite, str]]) -> None:
    for site, variant in variants:
        site.variant = variant
        site.prepare()
    for name, linear in packed_linears(model):
        linear.prepare(name)


@contextmanager
def quantized_in_groups(model: nn.Module) -> Iterator[None]:
    """Inside, every packed linear takes uniform codes with a scale for each `CHANNELS` channels of a token; its INT8 columns stay in 8 bits."""
    handles = []
    try:
        for _, linear in packed_linears(model):
            outliers = None if linear.perm is None or linear.outlier_weight is None else linear.perm[-linear.outlier_weight.shape[1] :]
            quantizer = ActQuantizer(ActFactors("per_group", group_size=CHANNELS), outliers).to(linear.row_scale.device).requires_grad_(False)

            def emulate(_: nn.Module, inputs: tuple[Tensor, ...], quantizer: ActQuantizer = quantizer) -> tuple[Tensor]:
                return (quantizer(inputs[0]),)

            handles.append(linear.register_forward_pre_hook(emulate))
        with quantized_at(model, frozenset()):
            yield
    finally:
        for handle in handles:
            handle.remove()


def choices() -> dict[str, frozenset[str]]:
    """What is measured: its name, and the sites in four bits."""
    alone = {site: frozenset({site}) for site in SITES}
    without = {f"{ALL} but {site}": frozenset(SITES) - {site} for site in SITES}
    return {NONE: frozenset(), **alone, **without, ALL: frozenset(SITES)}


def site_costs(model: nn.Module, config: RunConfig, tokenizer: Any, protocol: str, count: int = 0) -> tuple[str, dict[str, tuple[float, float]]]:
    """The metric's name, and perplexity with its standard error for every choice, `GROUPED` the last. `count`: windows, 0 for all. Raises what evaluation raises, and ModelError."""
    if not any(module.variant != "none" for module in model.modules() if isinstance(module, ActSite)):
        raise ModelError("the packed model has 16-bit activations: no site costs anything; name one with scheme.act_bits=4")
    data, name = windows(protocol, config, tokenizer), metric_name(protocol, config, tokenizer)
    data = data[: count or len(data)]
    device = next(model.parameters()).device
    found = {}
    ways = {choice: quantized_at(model, sites) for choice, sites in choices().items()} | {GROUPED: quantized_in_groups(model)}
    for choice, way in ways.items():
        with way:
            result = perplexity(forward_of(model, data, config.evaluation.batch_tokens), data, config.evaluation.batch_tokens, device=device, name=name)
        found[choice] = (result.ppl, result.stderr)
        print(f"{choice:16} {result.ppl:9.3f} ± {result.stderr:.3f}", flush=True)
    return name, found


def _measured_as(folder: Path, model: Any) -> ModelConfig:
    """The model section of the run that packed this folder, so that windows are the run's; of a folder alone, its context."""
    try:
        return teacher_config(folder, None)
    except ArtifactError:
        return ModelConfig(name=folder.name, context=int(model.config.max_position_embeddings))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    from lbllm_core.model.packed_folder import load_packed, load_tokenizer
    from lbllm_core.report.records import write_results

    parser = argparse.ArgumentParser(prog="python -m lbllm_core.evaluation.site_costs", description="What four-bit activations cost at each site.")
    parser.add_argument("--model-dir", default="", help="a packed model (default: the newest)")
    parser.add_argument("--protocol", default="ppl_wikitext2_s2048")
    parser.add_argument("--windows", type=int, default=0, help="the first ones of the protocol; 0: all")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--out", type=Path, help="results file to write (default: none, the figures are printed)")
    run_options(parser)
    chosen = parser.parse_args(arguments)
    if chosen.windows < 0 or chosen.batch_tokens < 1:
        parser.error("--windows must be at least 0 (0: all) and --batch-tokens at least 1")
    try:
        folder = packed_folder(home_folder(), chosen.model_dir)
        about = run_of(folder, chosen) if chosen.out else {}
        model: Any = load_packed(folder, resolve(RunConfig().hardware).device)
        config = RunConfig(model=_measured_as(folder, model))
        config = replace(config, evaluation=replace(config.evaluation, batch_tokens=chosen.batch_tokens))
        name, found = site_costs(model, config, load_tokenizer(folder), chosen.protocol, chosen.windows)
        if chosen.out:
            command = f"python -m lbllm_core.evaluation.site_costs --protocol {chosen.protocol} --windows {chosen.windows} --out {chosen.out}"
            context = about | {"windows": chosen.windows}
            write_results(chosen.out, command, [{"name": name, "value": value, "unit": "1", "stderr": error, "sites": choice, **context} for choice, (value, error) in found.items()])
            print(f"written: {chosen.out}")
    except LbllmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
