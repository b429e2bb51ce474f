"""The bodies of the pipeline's steps: load what came before, run a stage, write what comes after.

    step                 reads                      writes into its folder
    evaluate_teacher     -                          metrics only
    ptq_init             -                          student: block_000.safetensors ..., student.json, curves.json
    weight_distill       student                    student
    act_quant            student                    student, activations.json
    end_to_end           student                    student, activations.json
    pack_and_benchmark   student                    packed/ (a model folder), packing.json, samples.json
    evaluate_model       packed, teacher            metrics only
    evaluate_control     -                          metrics only
    score_requests       packed, or nothing         scores.safetensors

Stages are pure; files are touched here and in the ledger. `curves.json` holds what is a curve rather than a number:
`{"name": [[index, value], ...]}`, such as the error of each block; `activations.json` the histogram of each site's activations
and its clips and knees, `samples.json` what teacher and packed model write after the same words. A step that died is called again with the same folder and
goes on from its ledger.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbllm_kernels.activation import ActFactors
from torch import Tensor, nn

from lbllm_core.config import RunConfig, config_to_dict
from lbllm_core.engine.block_sweep import SweepPlan, Work, sweep
from lbllm_core.engine.files import write_atomic
from lbllm_core.engine.hardware import Hardware, resolve
from lbllm_core.engine.ledger import Ledger
from lbllm_core.engine.memory import release
from lbllm_core.engine.progress import Progress
from lbllm_core.engine.ranks import ALONE, Ranks
from lbllm_core.engine.step import Metrics, StepContext
from lbllm_core.engine.tiers import open_teacher
from lbllm_core.model.blocks import SITES
from lbllm_core.model.card import Origin
from lbllm_core.model.student import BlockState, block_file, load_block, state_tensors

if TYPE_CHECKING:
    from lbllm_core.evaluation.last_states import Model

STUDENT_SCHEMA = 1
SCORES = "scores.safetensors"


class _Bench:
    """What every stage needs on its table: the teacher on the device, tokens, hardware."""

    def __init__(self, config: RunConfig, home: Path, sequences: int, sweep: bool = True, ranks: Ranks = ALONE):
        """sweep: the stage goes block by block, so the teacher may be streamed."""
        from lbllm_core.data.tokens import calibration_tokens

        self.hardware: Hardware = resolve(config.hardware, ranks)
        self.decoder, self.tokenizer = open_teacher(config, home, self.hardware, whole=not sweep)
        self.ids: Tensor = calibration_tokens(config, self.tokenizer, home)[:sequences].to(self.hardware.device)


def _job_of(step: str, context: StepContext) -> tuple[Work, SweepPlan]:
    """What a step does with each block, and how it wants the loop to run."""
    from lbllm_core.stages.act_quant import refine_block
    from lbllm_core.stages.ptq_init import quantize_block
    from lbllm_core.stages.weight_distill import distill_block

    c, s = context.config, context.config.scheme
    if step == "ptq_init":
        return lambda job: quantize_block(job, s, c.ptq_init, c.seed), SweepPlan(step, False)
    start = context.inputs["student"]
    variant = activation_variant(c)
    if step == "weight_distill":
        plan = SweepPlan(step, True, target_on_student_stream=c.weight_distill.target == "student")
        if c.weight_distill.joint:
            plan = replace(plan, variant=variant, kv_bits=s.kv_bits)
        return lambda job: distill_block(job, load_block(start, job.index, "none"), s, c.weight_distill, c.seed), plan
    plan = SweepPlan(step, True, variant=variant, kv_bits=s.kv_bits)
    return lambda job: refine_block(job, load_block(start, job.index, "none"), s, c.act_quant, c.seed), plan


def sweep_here(step: str, context: StepContext, ranks: Ranks = ALONE) -> list[dict[str, float]]:
    """A step's sweep in this process, which may be one of several; the figures of each block."""
    from lbllm_core.engine.tiers import store_plan

    bench = _Bench(context.config, context.home, getattr(context.config, step).sequences, ranks=ranks)
    work, plan = _job_of(step, context)
    mine = (len(bench.ids) // ranks.size, bench.ids.shape[1], bench.decoder.width)
    store = store_plan(context.config, bench.hardware, context.home, mine, bench.decoder.streamed)
    return sweep(bench.decoder, bench.ids, work, plan, Ledger(context.folder), bench.hardware, context.report, store)


def _sweep(step: str, context: StepContext) -> list[dict[str, Any]]:
    """A step's sweep, here or in `hardware.gpus` processes."""
    count = context.config.hardware.gpus
    if count == 1:
        return sweep_here(step, context)
    from lbllm_core.engine.launch_ranks import run_ranks

    request = {"step": step, "config": config_to_dict(context.config), "inputs": {k: str(v) for k, v in context.inputs.items()}, "folder": str(context.folder), "home": str(context.home)}
    run_ranks(count, request, context.folder, context.report)
    blocks = len(list(context.folder.glob("block_*.safetensors")))
    return [Ledger(context.folder).figures(i) for i in range(blocks)]


def ptq_init(context: StepContext) -> Metrics:
    """Stage 1. Metrics: mean weighted error of the linears, mean extra error of the int8 snap, effective bits."""
    figures = _sweep("ptq_init", context)
    errors = [v for block in figures for k, v in block.items() if k.startswith("weight_error/")]
    snaps = [v for block in figures for k, v in block.items() if k.startswith("snap_error/")]
    curves = {"weight_error": [sum(v for k, v in b.items() if k.startswith("weight_error/")) / 7 for b in figures]}
    _finish(context, "ptq_init", len(figures), {name: _by_index(values) for name, values in curves.items()})
    return {"stage1/weight_error": sum(errors) / len(errors), "stage1/snap_error_added": sum(snaps) / len(snaps)}


def weight_distill(context: StepContext) -> Metrics:
    """Stage 2. Metrics: mean and last-block relative error of the blocks' outputs."""
    return _block_metrics("stage2", _sweep("weight_distill", context), context)


def act_quant(context: StepContext) -> Metrics:
    """Stage 3. Metrics as stage 2, now with quantized activations."""
    figures = _sweep("act_quant", context)
    if all("activations" in b for b in figures):
        _write_json(context.folder / "activations.json", {"blocks": [b["activations"] for b in figures]})
    return _block_metrics("stage3", figures, context)


def end_to_end(context: StepContext) -> Metrics:
    """Stage 4. Metrics: mean loss of the first and of the last fifth of the steps."""
    from lbllm_core.stages.end_to_end import Refinement, refine

    c = context.config
    bench = _Bench(c, context.home, c.dataset.sequences, sweep=False)
    variant = activation_variant(c)
    start = (load_block(context.inputs["student"], i, variant) for i in range(len(bench.decoder.blocks)))
    refinement = Refinement(bench.decoder, c.end_to_end, c.scheme, bench.hardware, c.seed)
    ledger = Ledger(context.folder, "checkpoint")
    made = refine(refinement, bench.ids, start, ledger, context.report)
    blocks = Ledger(context.folder)
    for index, state in enumerate(made.states):
        blocks.save(index, state_tensors(state), {})
    for leftover in context.folder.glob("checkpoint_*"):
        leftover.unlink()
    sites = [{site: {"learned": [f.clip_max, f.clip_min, f.knee_low, f.knee_high]} for site, f in state.sites.items()} for state in made.states]
    _write_json(context.folder / "activations.json", {"blocks": sites})
    losses = [h["loss"] for h in made.history]
    curves = {"loss": losses, "error_before": made.error_before, "error_after": made.error_after}
    _finish(context, "end_to_end", len(made.states), {name: _by_index(values) for name, values in curves.items() if values})
    fifth = max(1, len(losses) // 5)
    return {"stage4/kl_first": sum(losses[:fifth]) / fifth, "stage4/kl_last": sum(losses[-fifth:]) / fifth} if losses else {}


def evaluate_teacher(context: StepContext) -> Metrics:
    """The protocols and tasks of the config on the teacher in float32; its gate is checked by the pipeline."""
    from lbllm_core.evaluation.last_states import teacher_of

    return _measure(context, *teacher_of(context.config, context.home))


def pack_and_benchmark(context: StepContext) -> Metrics:
    """Pack, check and time. Fails (GateError) on one differing integer, or when packed and fake-quantized logits part.

    Metrics: bits itemised, bytes, integers compared, SQNR of the logits, and speed of packed model and teacher.
    """
    from lbllm_core.evaluation.whole_models import measure_speed

    size, checked, held, there = _pack_and_check(context)
    release()  # the teacher is gone, and two processes of the measurement are about to load models of their own
    sections = {"size": size, "pack": checked, "speed": measure_speed(context, held, there)}
    return {f"{section}/{name}": float(value) for section, figures in sections.items() for name, value in figures.items()}


def _pack_and_check(context: StepContext) -> tuple[dict[str, float], dict[str, float], dict[str, float], float]:
    """Figures of size and of the check; bytes of teacher and packed model when they are whole, and how many there may be."""
    from lbllm_core.evaluation.packed_check import check, require
    from lbllm_core.evaluation.whole_models import room, write_samples
    from lbllm_core.model.packed_folder import open_packed, pack_student
    from lbllm_core.model.student_block import fake_quant_block

    c, hardware, folder = context.config, resolve(context.config.hardware), context.folder / "packed"
    teacher, tokenizer = open_teacher(c, context.home, hardware)
    student, variant = context.inputs["student"], activation_variant(c)

    count, asked = len(teacher.blocks), itertools.count()

    def state(index: int) -> BlockState:
        done = next(asked)  # every block is asked for twice: to be written, and to be checked
        context.report(Progress("pack_and_benchmark", done, 2 * count, begins=not done))
        return load_block(student, index, variant, latents=False)

    def fake_block(index: int) -> nn.Module:
        return fake_quant_block(teacher.blocks[index], _with_sites(state(index), variant), c.scheme.kv_bits)

    packing = pack_student(teacher, map(state, range(count)), folder, c.scheme, tokenizer, _origin(c, student))
    ids = _check_ids(c, tokenizer, context.home).to(hardware.device)
    integers, logits = check(open_packed(folder, hardware.device), ids, teacher, fake_block)
    context.report(Progress("pack_and_benchmark", 2 * count, 2 * count))
    assert logits is not None
    require(integers, logits, c.pack.min_sqnr_db)
    report = packing.metrics()
    size = {"disk_mb": report["packed_bytes"] / 1e6, "teacher_disk_mb": report["teacher_fp32_bytes"] / 2e6, "effective_bpw": report["effective_bpw"]}
    size |= {name: value for name, value in report.items() if name.startswith(("bpw_", "bytes_"))}
    checked = {"integers_compared": float(integers.compared), "integer_mismatches": float(integers.mismatches)}
    checked |= {"logits_sqnr_db": min(logits.logits_sqnr_db, 999.0), "worst_linear_sqnr_db": min(logits.worst_linear_sqnr_db, 999.0)}
    detail = {"paths": list(integers.paths), "worst_linear": logits.worst_linear, "worst_block": logits.worst_block, "size": size, "check": checked}
    _write_json(context.folder / "packing.json", detail)
    held, there = {"teacher": float(packing.teacher_bytes), "packed": packing.loaded_bytes}, room(context, teacher)
    write_samples(context, teacher, tokenizer, held, there)
    return size, checked, held, there


def evaluate_model(context: StepContext) -> Metrics:
    """The protocols and tasks of the config on the packed model, through the integer path that dispatch chooses."""
    from lbllm_core.evaluation.packed_model import packed_of
    from lbllm_core.model.load import teacher_tokenizer

    c = context.config
    return _measure(context, packed_of(c, context.home, context.inputs["packed"] / "packed"), teacher_tokenizer(c.model, context.home))


def evaluate_control(context: StepContext) -> Metrics:
    """The protocols and tasks of the config on the teacher with its linears in a format of bitsandbytes, the only word of `evaluation.baselines`.

    Metrics: also bits itemised, and what the model would take on disk with everything but those linears in 16 bits.
    """
    from lbllm_core.evaluation.last_states import Streamed, teacher_of
    from lbllm_core.model.bitsandbytes_linear import replace_linears
    from lbllm_core.model.blocks import Decoder

    (control,) = context.config.evaluation.baselines
    model, tokenizer = teacher_of(context.config, context.home)
    decoder = model.decoder if isinstance(model, Streamed) else Decoder(model)
    parameters = sum(p.numel() for p in decoder.model.parameters())
    bits = replace_linears(decoder, control)
    size = {"disk_mb": (2 * (parameters - bits.weights) + bits.total / 8) / 1e6, "effective_bpw": bits.effective_bpw}
    size |= {f"bpw_{name}": value for name, value in bits.per_weight().items()}
    return {f"size/{name}": value for name, value in size.items()} | dict(_measure(context, model, tokenizer))


def score_requests(context: StepContext) -> Metrics:
    """Every log-likelihood of the requests file, by the packed model where one is given, else by the teacher in float32."""
    from lbllm_core.evaluation.request_file import located, read_requests
    from lbllm_core.evaluation.request_scores import score_model

    requests = read_requests(located(context.config.evaluation.requests))
    packed = context.inputs["packed"] / "packed" if "packed" in context.inputs else None
    scores = score_model(context.config, context.home, requests, context.folder / SCORES, packed, context.report)
    return {"zero_shot/requests": float(len(requests)), "zero_shot/mean_log_likelihood": float(scores.values.mean())}


def _measure(context: StepContext, model: Model, tokenizer: Any) -> Metrics:
    from lbllm_core.evaluation.last_states import device_of
    from lbllm_core.evaluation.perplexity import forward_of, metric_name, perplexity, windows
    from lbllm_core.evaluation.zero_shot import zero_shot

    e = context.config.evaluation
    found: dict[str, float] = {}
    for protocol in e.protocols:
        name = metric_name(protocol, context.config, tokenizer)
        data = windows(protocol, context.config, tokenizer)
        forward = forward_of(model, data, e.batch_tokens, context.report, name)
        result = perplexity(forward, data, e.batch_tokens, context.report, device=device_of(model), name=name)
        found |= {name: result.ppl, f"{name}_stderr": result.stderr}
    if e.tasks:
        found |= zero_shot(model, tokenizer, e.tasks, e.task_limit, add_bos=context.config.model.add_bos, batch_tokens=e.batch_tokens, report=context.report)
    return found


def _origin(c: RunConfig, student: Path) -> Origin:
    """Where the packed model comes from, for its card. A folder of the user's is called by its name alone."""
    m, d = c.model, c.dataset
    base = " ".join(word for word in (Path(m.path).name if m.source == "folder" else m.path or m.source, m.file) if word)
    data = f"{d.name} ({d.source}), {d.sequences} sequences of {d.seq_len} tokens, seed {c.seed}"
    return Origin(m.name, base, m.license, data, dict(_student(student)["recipe"]))


def _check_ids(c: RunConfig, tokenizer: Any, home: Path) -> Tensor:
    """One sequence of calibration text for the packed check, `(1, check_tokens)`."""
    from lbllm_core.data.tokens import calibration_tokens

    return calibration_tokens(c, tokenizer, home).flatten()[: min(c.pack.check_tokens, c.model.context)][None]


def _with_sites(state: BlockState, variant: str) -> BlockState:
    """Default factors where no stage has learned any (a packed model always has some)."""
    if variant == "none" or state.sites:
        return state
    return replace(state, sites={site: ActFactors(variant) for site in SITES})


def activation_variant(c: RunConfig) -> str:
    """How a config's activations are quantized; `none` where they stay as they are."""
    return c.scheme.act_variant if c.scheme.act_bits == 4 else "none"


def _block_metrics(section: str, figures: list[dict[str, Any]], context: StepContext) -> Metrics:
    errors = [b["block_rel_mse"] for b in figures]
    names = ("block_rel_mse", "error_before", "error_after", "loss_before", "loss_after")
    curves = {name: _by_index([b[name] for b in figures]) for name in names if all(name in b for b in figures)}
    if all("losses" in b for b in figures):  # the x axis counts blocks, a step is a part of one
        curves["loss"] = [[i + share, loss] for i, b in enumerate(figures) for share, loss in b["losses"]]
    step = {"stage2": "weight_distill", "stage3": "act_quant"}[section]
    _finish(context, step, len(figures), curves)
    return {f"{section}/block_rel_mse_mean": sum(errors) / len(errors), f"{section}/block_rel_mse_last": errors[-1]}


def _by_index(values: list[float]) -> list[list[float]]:
    return [[i, value] for i, value in enumerate(values)]


def _finish(context: StepContext, stage: str, n_blocks: int, curves: dict[str, list[list[float]]]) -> None:
    """The files that make a folder a student: what it is, how it was made so far, and its curves."""
    folder, c = context.folder, context.config
    missing = [block_file(folder, i).name for i in range(n_blocks) if not block_file(folder, i).exists()]
    assert not missing, missing
    settings = ", ".join(f"{key}={value}" for key, value in vars(getattr(c, stage)).items() if key != "enabled")
    recipe = [*(_student(context.inputs["student"])["recipe"] if "student" in context.inputs else []), [stage, settings]]
    about = {"schema": STUDENT_SCHEMA, "stage": stage, "n_blocks": n_blocks, "scheme": asdict(c.scheme), "recipe": recipe}
    _write_json(folder / "student.json", about)
    _write_json(folder / "curves.json", curves)


def _student(folder: Path) -> dict[str, Any]:
    """What a student's folder says about it."""
    about: dict[str, Any] = json.loads((folder / "student.json").read_text(encoding="utf-8"))
    return about


def _write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, sort_keys=True, indent=1).encode())
