"""Before a long run: is everything there, will it fit, how long will it take. Seconds now instead of hours lost.

1. *Inputs.* The model's small files (`model/inspect.py`), the calibration text and its size, the data of every protocol and task,
   the device. All that is wrong is said at once; nothing heavy is loaded.
2. *Estimate.* Operations, memory and disk of each step from shapes (`engine/estimate.py`), seconds by speeds that are measured here
   and now (`engine/machine.py`).
3. *Verdict.* The limit that binds is the largest share of host memory, device memory or disk. Above one the run is refused with the
   numbers and what would make it smaller; `hardware.preflight=warn` lets it begin all the same, `off` skips 2 and 3.

Text: a token is at least one byte in every tokenizer here, so files with fewer bytes than tokens asked are refused now; a subtler
shortage is found when the text is cut (`data/tokens.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lbllm_core.config import RunConfig
from lbllm_core.engine import machine, tiers
from lbllm_core.engine.estimate import Estimate, estimate
from lbllm_core.engine.hardware import resolve
from lbllm_core.engine.machine import Limits
from lbllm_core.engine.terminal import duration
from lbllm_core.errors import ConfigError, DataError, LbllmError, PreflightError
from lbllm_core.model.inspect import Shapes, inspect_model
from lbllm_core.report.tables import Cells, plain

LARGE_TEXT = 256 << 20  # bytes of calibration files up to which their documents are counted
Verdict = tuple[str, float]  # which limit, and the share of it that is needed


def preflight(config: RunConfig, home: Path) -> tuple[Estimate | None, Limits]:
    """Check, estimate, and refuse what cannot fit. The estimate is None when `hardware.preflight=off`.

    Raises PreflightError (all problems of the inputs, or the numbers that do not fit), or the one LbllmError that was found.
    """
    shapes = check_inputs(config, home)
    hardware = resolve(config.hardware)
    limits = machine.limits(hardware, home)
    if config.hardware.preflight == "off":
        return None, limits
    if hardware.device.type == "cuda" or config.hardware.hidden_tier != "auto":
        try:
            config, _ = tiers.resolved(config, shapes, hardware, limits)
        except PreflightError:
            if config.hardware.preflight == "refuse":
                raise
    found = estimate(config, shapes, machine.rates(hardware, shapes.hidden, shapes.ffn), hardware.device.type == "cuda")
    if config.hardware.preflight == "refuse":
        require_whole(config, found, limits, home)
        require_fit(found, limits)
    return found, limits


def check_inputs(config: RunConfig, home: Path) -> Shapes:
    """The model's shapes, when model, text, evaluation data and device are all there. Raises what is wrong, all at once."""
    from lbllm_core.data.tokens import evaluation_digest
    from lbllm_core.evaluation.request_file import located, read_requests
    from lbllm_core.model.bitsandbytes_linear import library
    from lbllm_core.pipeline import UNPACKED

    shapes: list[Shapes] = []
    checks: tuple[Callable[[], object], ...] = (
        lambda: resolve(config.hardware),
        lambda: shapes.append(inspect_model(config.model, home)),
        lambda: check_text(config, *shapes),
        lambda: evaluation_digest(config),
        lambda: read_requests(located(config.evaluation.requests)) if config.evaluation.requests else None,
        lambda: library() if set(UNPACKED) & set(config.evaluation.baselines) else None,
    )
    problems: list[LbllmError] = []
    for check in checks:
        try:
            check()
        except LbllmError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ConfigError([line for p in problems for line in str(p).splitlines()])
    return shapes[0]


def check_text(config: RunConfig, shapes: Shapes | None = None) -> None:
    """DataError when sequences are too long for the model, or files are absent, unreadable, or hold fewer bytes than tokens are asked for."""
    from lbllm_core.data import text
    from lbllm_core.pipeline import why_skipped

    data = config.dataset
    if shapes is not None and data.seq_len > shapes.context:
        raise DataError(f"dataset.seq_len={data.seq_len} is longer than the {shapes.context} tokens of {config.model.name}'s context; lower it")
    if data.source not in ("files", "embedded") or "ptq_init" in why_skipped(config):
        return
    if data.source == "files" and sum(p.stat().st_size for p in text.matching_files(data.files)) > LARGE_TEXT:
        return
    size = sum(len(document.encode("utf-8", "surrogatepass")) + 2 for document in text.calibration_documents(data))
    wanted = data.sequences * (data.seq_len - config.model.add_bos)
    if size < wanted:
        raise DataError(
            f"dataset {data.name} holds {size} bytes of text, so at most {size} tokens; {wanted} are needed ({data.sequences} sequences of {data.seq_len}); "
            "add files or lower dataset.sequences or dataset.seq_len"
        )


def verdict(found: Estimate, limits: Limits) -> Verdict:
    """The limit that binds and the share of it that the run needs: above 1 it cannot fit."""
    shares = {"host memory": found.host / limits.host, "disk": found.disk / max(limits.disk, 1)}
    if limits.device:
        shares["device memory"] = found.device / limits.device
    name = max(shares, key=lambda key: shares[key])
    return name, shares[name]


def require_whole(config: RunConfig, found: Estimate, limits: Limits, home: Path) -> None:
    """PreflightError when what holds the whole model has no room: stage 4 of a streamed model, or text that the teacher has yet to write. Known now, not hours later."""
    from lbllm_core.data.self_generated import is_written, needed_bytes, wanted

    for step in found.steps if config.hardware.streaming == "on" else ():
        shortage = _shortage(step.host, step.device, limits)
        if step.step == "end_to_end" and shortage:
            raise PreflightError(f"stage 4 trains the whole model at once, {shortage}, while every other step holds one block at a time: leave it out with end_to_end=off (end_to_end.enabled=false)")
    shortage = _shortage(*needed_bytes(found.shapes, config.dataset, bool(limits.device)), limits)
    if wanted(config.dataset) and shortage and not is_written(config, home):
        asked = "dataset.source=self_generated" if config.dataset.source == "self_generated" else f"dataset.generated={config.dataset.generated}"
        raise PreflightError(f"{asked} lets the whole teacher write, {shortage}: choose text of another source, or copy the home folder's texts/ from a machine where it fits")


def _shortage(host: float, device: float, limits: Limits) -> str:
    """What a step needs and what is there, of the memory that is short; empty when there is enough."""
    for what, needed, there in (("device memory", device, limits.device), ("host memory", host, limits.host)):
        if there and needed > there:
            return f"which needs about {gb(needed)} of {what}, and {gb(there)} are there"
    return ""


def require_fit(found: Estimate, limits: Limits) -> None:
    """PreflightError, with the numbers, when a limit is exceeded."""
    problems = []
    for what, needed, there, remedy in (
        ("host memory", found.host, limits.host, "a smaller model, model.blocks=N for a trial, fewer or shorter sequences, evaluation.batch_tokens, or a machine with more"),
        ("device memory", found.device, limits.device, "smaller weight_distill.batch_size and act_quant.batch_size, end_to_end.micro_batch=1, end_to_end.gradient_checkpointing=true, fewer sequences, or hardware.device=cpu"),
        ("disk", found.disk, limits.disk, "room in the home folder, or LBLLM_HOME on another disk"),
    ):
        if (there or what == "disk") and needed > there:
            by_step = {"host memory": [s.host for s in found.steps], "device memory": [s.device for s in found.steps], "disk": [s.work.disk for s in found.steps]}[what]
            worst = found.steps[by_step.index(max(by_step))]
            problems.append(f"{what}: about {gb(needed)} needed (most by {worst.step}), {gb(there)} there; try {remedy}")
    if problems:
        head = f"this run cannot fit ({found.shapes.parameters / 1e9:.2f} billion parameters):"
        raise PreflightError("\n  ".join([head, *problems, "these are estimates; hardware.preflight=warn begins all the same"]))


def gb(size: float) -> str:
    """Bytes in units of 10^9."""
    return f"{size / 1e9:.1f} GB"


def one_line(config: RunConfig, found: Estimate | None, limits: Limits) -> str:
    """The estimate as one line for the start of a run."""
    if found is None:
        return f"preflight: {config.model.name}, inputs are there; no estimate (hardware.preflight=off)"
    limit, share = verdict(found, limits)
    device = f", {gb(found.device)} of {gb(limits.device)} on the device" if limits.device else ""
    over = " - IT WILL NOT FIT" if share > 1 else ""
    return (
        f"preflight (estimate): {config.model.name}, {found.shapes.parameters / 1e6:.4g} M parameters; about {duration(found.seconds)} when nothing is cached; "
        f"{gb(found.host)} of {gb(limits.host)} memory{device}, {gb(found.disk)} of {gb(limits.disk)} disk; {limit} binds ({share:.0%}){over}"
    )


def cells(found: Estimate) -> Cells:
    """A line a step: time, memory, disk, operations."""
    lines = [["step", "row", "time", "host GB", *(["device GB"] if found.on_device else []), "disk MB", "10^12 operations"]]
    for s in found.steps:
        device = [f"{s.device / 1e9:.2f}"] if found.on_device else []
        lines.append([s.step, s.row, duration(s.seconds), f"{s.host / 1e9:.2f}", *device, f"{s.work.disk / 1e6:.0f}", f"{(s.work.fp32 + s.work.compute) / 1e12:.3g}"])
    return lines


def streams_line(config: RunConfig, found: Estimate, limits: Limits) -> str:
    """Where hidden states will lie, and what that asks of the place."""
    seconds = sum(s.seconds for s in found.steps if s.step == "weight_distill" and s.row == "final") / max(found.shapes.blocks, 1)
    try:
        return tiers.told(tiers.resolved(config, found.shapes, resolve(config.hardware), limits)[1], seconds)
    except PreflightError as error:
        return str(error)


def report(config: RunConfig, found: Estimate | None, limits: Limits) -> str:
    """The whole table, its sums, what is there, and what is free now."""
    line = one_line(config, found, limits)
    if found is None:
        return line + "\n"
    free = "" if found.host <= limits.host_free else f"\nnow only {gb(limits.host_free)} of memory are free: other programs hold the rest"
    return f"{plain(cells(found))}\n{line}{free}\n{streams_line(config, found, limits)}\nSteps that are cached cost nothing; see lbllm_core/engine/estimate.py for the formulas.\n"
