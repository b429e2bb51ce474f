"""The formulas against counts: shapes from real architectures, operations from torch's counter, memory against arithmetic by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from flows.compose import compose
from lbllm_core.bench_block import SHAPES
from lbllm_core.config import ActQuantConfig, HardwareConfig, PtqInitConfig, RunConfig, SchemeConfig, WeightDistillConfig
from lbllm_core.engine import estimate as formulas
from lbllm_core.engine import estimate_large, machine, preflight
from lbllm_core.engine.estimate import Estimate, StepEstimate, estimate
from lbllm_core.engine.hardware import resolve
from lbllm_core.engine.machine import Limits, Rates
from lbllm_core.errors import DataError, PreflightError
from lbllm_core.model import inspect, tiny
from lbllm_core.model.inspect import Shapes, inspect_model

RATES = Rates(1e12, 2e12, 1e11, 1e-6, 1e9)
SEVEN_B = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, vocab_size=32000, max_position_embeddings=4096)
ROOM = Limits(10**13, 10**13, 0, 0, 10**13)


@pytest.fixture(scope="module")
def seven_b() -> Shapes:
    return inspect.architecture_shapes(SEVEN_B, 0)


def test_shapes_are_counted(seven_b: Shapes) -> None:
    assert seven_b.parameters == 6_738_415_616  # LLaMA-2-7B
    assert seven_b.linears == 4 * 4096 * 4096 + 3 * 4096 * 11008
    assert (seven_b.blocks, seven_b.heads, seven_b.kv_heads, seven_b.head_dim) == (32, 32, 32, 128)
    qwen = inspect.architecture_shapes(Qwen2Config(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=100), 2)
    assert (qwen.blocks, qwen.kv_heads, qwen.head_dim) == (2, 2, 16)


def test_a_gguf_header_gives_the_same_shapes_as_the_converted_model(models_home: Path) -> None:
    from lbllm_core.model.load import load_teacher

    config = compose(["experiment=smoke"]).model
    header = inspect_model(config, models_home)
    teacher = load_teacher(config, models_home).model
    folder = inspect.architecture_shapes(teacher.config, 0)
    same = {name: getattr(folder, name) for name in ("blocks", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocabulary", "linears", "parameters")}
    assert {name: getattr(header, name) for name in same} == same
    assert header.converted


def test_operations_are_those_that_torch_counts() -> None:
    model = AutoModelForCausalLM.from_config(tiny.architecture(), attn_implementation="eager")  # the counter does not see the fused one
    shapes = inspect_model(RunConfig().model, Path("unused"))
    ids = torch.zeros(2, 128, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    ours = ids.numel() * (shapes.blocks * formulas.forward(shapes, 128) + 2 * shapes.hidden * shapes.vocabulary)
    assert counter.get_total_flops() == pytest.approx(ours, rel=0.05)


@pytest.mark.parametrize("experiment", ["embedded", "tiny", "paper_main_llama2_7b_w1p1a4", "ablation_wat_latent_all"])
def test_every_planned_step_is_estimated_once(experiment: str, seven_b: Shapes) -> None:
    config = compose([f"experiment={experiment}"])
    found = estimate(config, seven_b, RATES, False)
    assert {s.step for s in found.steps} == {p.spec.name for p in formulas.plan(config)}
    assert all(s.seconds > 0 and s.host > 4 * seven_b.parameters and s.device == 0 for s in found.steps)
    final = [s for s in found.steps if s.row == "final"]
    assert len({s.step for s in final}) == len(final)


def test_shared_steps_are_counted_once() -> None:
    shapes = inspect_model(RunConfig().model, Path("unused"))
    rows = [(s.step, s.row) for s in estimate(compose(["model=tiny"]), shapes, RATES, False).steps]
    assert ("ptq_init", "final") in rows
    assert ("ptq_init", "stage1") not in rows, "the row stage1 starts from the same stage 1"
    assert ("ptq_init", "rtn") in rows
    assert ("evaluate_model", "stage1") in rows


def test_a_7b_on_a_gpu_needs_what_arithmetic_says(seven_b: Shapes) -> None:
    config = dataclasses.replace(compose(["experiment=paper_main_llama2_7b_w1p1a4"]))
    found = {s.step: s for s in estimate(config, seven_b, RATES, True).steps if s.row == "final"}
    stream = 4 * 8192 * 2048 * 4096  # 275 GB: 16.8 million hidden states in float32
    assert found["weight_distill"].device > 4 * seven_b.parameters + 4 * stream
    assert found["weight_distill"].device < 4 * seven_b.parameters + 5 * stream
    assert found["weight_distill"].host < 40e9, "streams lie on the device"
    operations = found["weight_distill"].work.compute
    assert operations == pytest.approx(8192 * 2048 * (2 + 3 * 2) * (2 * 6.476e9 + 32 * 4 * 2048 * 4096), rel=0.01)


def test_estimates_grow_with_what_they_should(seven_b: Shapes) -> None:
    base = compose(["experiment=paper_recipe"])
    small = dataclasses.replace(base, weight_distill=dataclasses.replace(base.weight_distill, epochs=1))
    large, less = (next(s for s in estimate(c, seven_b, RATES, True).steps if s.step == "weight_distill") for c in (base, small))
    assert large.seconds > 1.4 * less.seconds
    assert large.device == less.device
    slow = estimate(base, seven_b, dataclasses.replace(RATES, matmul_compute=2e11), True)
    assert slow.seconds > 3 * estimate(base, seven_b, RATES, True).seconds


def of(seven_b: Shapes, on_device: bool = True) -> Estimate:
    return estimate(compose(["experiment=paper_recipe"]), seven_b, RATES, on_device)


def test_the_limit_that_binds_and_the_refusal(seven_b: Shapes) -> None:
    found = of(seven_b)
    preflight.require_fit(found, dataclasses.replace(ROOM, device=10**13))
    assert preflight.verdict(found, Limits(10**13, 10**13, 80 * 10**9, 80 * 10**9, 10**13))[0] == "device memory"
    with pytest.raises(PreflightError) as caught:
        preflight.require_fit(found, Limits(10**10, 10**10, 80 * 10**9, 80 * 10**9, 10**6))
    message = str(caught.value)
    for word in ("6.74 billion parameters", "host memory: about", "device memory: about", "80.0 GB there", "disk: about", "most by", "gradient_checkpointing"):
        assert word in message
    assert PreflightError.exit_code == 2
    with pytest.raises(PreflightError, match=r"host memory: about \d+\.\d GB needed"):
        preflight.require_fit(of(seven_b, False), Limits(64 * 10**9, 64 * 10**9, 0, 0, 10**13))


def streamed(enabled: bool, streaming: str = "on") -> RunConfig:
    base = compose(["experiment=paper_main_llama2_7b_w1p1a4"])
    hardware = dataclasses.replace(base.hardware, device="cuda", streaming=streaming, hidden_tier="host", hidden_dtype="bf16")
    return dataclasses.replace(base, hardware=hardware, end_to_end=dataclasses.replace(base.end_to_end, enabled=enabled))


def test_streamed_steps_hold_two_blocks_and_stage_4_all_of_them(seven_b: Shapes) -> None:
    found = {s.step: s for s in estimate(streamed(True), seven_b, RATES, True).steps if s.row == "final" or s.step == "evaluate_teacher"}
    whole = {s.step: s for s in estimate(streamed(True, "off"), seven_b, RATES, True).steps if s.row == "final" or s.step == "evaluate_teacher"}
    for step in ("evaluate_teacher", "pack_and_benchmark", "evaluate_model"):
        assert found[step].device < 12e9 < 4 * seven_b.parameters < whole[step].device
        assert found[step].host < 30e9
    assert found["end_to_end"].device > 4 * seven_b.parameters


def test_stage_4_of_a_streamed_model_is_refused_before_stage_1(seven_b: Shapes) -> None:
    room = Limits(10**12, 10**12, 40 * 10**9, 40 * 10**9, 10**13)
    config = streamed(True)
    with pytest.raises(PreflightError) as caught:
        preflight.require_whole(config, estimate(config, seven_b, RATES, True), room, Path("unused"))
    assert str(caught.value).count("\n") == 0
    for word in ("stage 4 trains the whole model at once", "GB of device memory", "40.0 GB are there", "end_to_end=off"):
        assert word in str(caught.value)
    preflight.require_whole(streamed(False), estimate(streamed(False), seven_b, RATES, True), room, Path("unused"))
    preflight.require_whole(config, estimate(config, seven_b, RATES, True), dataclasses.replace(room, device=10**12), Path("unused"))
    preflight.require_fit(estimate(streamed(False), seven_b, RATES, True), room)


@pytest.mark.parametrize("values", [{"source": "self_generated"}, {"generated": 1}])
def test_text_of_a_teacher_that_does_not_fit_is_refused(seven_b: Shapes, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]) -> None:
    from lbllm_core.data import self_generated

    base = streamed(False)
    config = dataclasses.replace(base, dataset=dataclasses.replace(base.dataset, **values))
    found, written = estimate(config, seven_b, RATES, True), []
    monkeypatch.setattr(self_generated, "is_written", lambda *_: bool(written))
    with pytest.raises(PreflightError, match=r"whole teacher write, which needs about 29\.1 GB of device memory, and 28\.0 GB are there"):  # 27.0 hold the teacher alone
        preflight.require_whole(config, found, Limits(10**12, 10**12, 28 * 10**9, 28 * 10**9, 10**13), Path("unused"))
    preflight.require_whole(config, found, Limits(10**12, 10**12, 40 * 10**9, 40 * 10**9, 10**13), Path("unused"))
    on_cpu = dataclasses.replace(config, hardware=dataclasses.replace(config.hardware, device="cpu", streaming="off"))
    with pytest.raises(PreflightError, match=r"whole teacher write, which needs about 61\.\d GB of host memory, and 60\.0 GB are there"):  # a batch of 16
        preflight.require_whole(on_cpu, estimate(on_cpu, seven_b, RATES, False), Limits(60 * 10**9, 60 * 10**9, 0, 0, 10**13), Path("unused"))
    written.append(1)
    preflight.require_whole(config, found, Limits(10**12, 10**12, 20 * 10**9, 20 * 10**9, 10**13), Path("unused"))


def test_limits_and_rates_are_measured_here(tmp_path: Path) -> None:
    hardware = resolve(HardwareConfig(device="cpu"))
    limits = machine.limits(hardware, tmp_path / "not" / "yet")
    assert 0 < limits.host_free <= limits.host
    assert limits.disk > 0
    assert limits.device == 0
    rates = machine.rates(hardware, 64, 172)
    assert 1e8 < rates.matmul_fp32 < 1e15
    assert 1e8 < rates.traffic < 1e14
    assert 1e-8 < rates.call < 1e-2
    assert machine.rates(hardware, 64, 172) is rates


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("123456789\n")
    (tmp_path / "unlimited").write_text("max\n")
    monkeypatch.setattr(machine, "CGROUP_LIMITS", (str(tmp_path / "memory.max"), str(tmp_path / "unlimited"), str(tmp_path / "absent")))
    assert machine.limits(resolve(HardwareConfig(device="cpu")), tmp_path).host == 123456789


def test_text_is_bounded_by_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 100)
    config = compose(["model=tiny", "dataset.source=files", f"dataset.files={tmp_path}/*.txt", "dataset.sequences=1", "ptq_init.sequences=1", "weight_distill.sequences=1", "act_quant.sequences=1"])
    preflight.check_text(dataclasses.replace(config, dataset=dataclasses.replace(config.dataset, seq_len=100)))
    with pytest.raises(DataError, match=r"at most 102 tokens; 128 are needed \(1 sequences of 128\)"):
        preflight.check_text(config)


def test_the_line_and_the_table_say_estimate(seven_b: Shapes) -> None:
    config = compose(["experiment=paper_recipe"])
    line = preflight.one_line(config, of(seven_b), dataclasses.replace(ROOM, device=10**12))
    for word in ("estimate", "6738 M parameters", "when nothing is cached", "on the device", "binds"):
        assert word in line
    table = preflight.report(config, of(seven_b, False), dataclasses.replace(ROOM, host_free=1))
    assert "ptq_init" in table
    assert "other programs hold the rest" in table
    assert "device GB" not in table


def test_the_estimate_of_tiny_is_of_the_right_size(models_home: Path) -> None:
    """No timing: its memory and disk against what the architecture has."""
    config = compose(["model=tiny"])
    found = estimate(config, inspect_model(config.model, models_home), RATES, False)
    assert found.shapes.parameters == sum(p.numel() for p in tiny.untrained(0).parameters())
    assert found.disk < 5e6
    assert found.host < 2e9


RECORDED = json.loads((Path(__file__).parents[2] / "results" / "scale_h200.json").read_text())["records"]
SWEPT = [r["stage"] for r in RECORDED if r["name"] in ("stage1_s", "block_s")]
WITHIN = 0.15


def recorded(name: str, **about: object) -> float:
    """The one record of a name with these circumstances."""
    (found,) = [r for r in RECORDED if r["name"] == name and all(r.get(k) == v for k, v in about.items())]
    return float(found["value"])


def measured_rates() -> Rates:
    """The speeds of the machine that measured, as its own preflight probed them."""
    return Rates(**{r["of"]: float(r["value"]) for r in RECORDED if r["name"] == "rate"})


def sweep_of(stage: str, seven_b: Shapes) -> tuple[RunConfig, Shapes]:
    """The configuration and shapes of a recorded sweep."""
    about = next(r for r in RECORDED if r.get("stage") == stage and "tier" in r)
    tokens = {s: int(next(r["tokens"] for r in RECORDED if r.get("stage") == s and "tier" in r)) // 2048 for s in SWEPT}
    base = compose(["experiment=paper_recipe"])
    config = dataclasses.replace(
        base,
        scheme=SchemeConfig(level_mode="explicit", group_size=128),
        dataset=dataclasses.replace(base.dataset, sequences=max(tokens.values()), seq_len=2048),
        hardware=HardwareConfig(device="cuda", streaming="on", hidden_tier=about["tier"], hidden_dtype=about["dtype"]),
        ptq_init=PtqInitConfig(sequences=tokens["ptq_init"]),
        weight_distill=WeightDistillConfig(sequences=tokens["weight_distill"], epochs=2, batch_size=2),
        act_quant=ActQuantConfig(sequences=tokens["act_quant"], epochs=1, batch_size=2),
    )
    return config, dataclasses.replace(seven_b, blocks=about["blocks"])


def estimated(stage: str, config: RunConfig, shapes: Shapes) -> StepEstimate:
    return next(s for s in estimate(config, shapes, measured_rates(), True).steps if s.step == stage)


def swept(stage: str, seven_b: Shapes) -> StepEstimate:
    """The estimate of a recorded sweep."""
    return estimated(stage, *sweep_of(stage, seven_b))


@pytest.mark.parametrize("stage", SWEPT)
def test_times_of_large_blocks_are_those_that_were_measured(stage: str, seven_b: Shapes) -> None:
    assert swept(stage, seven_b).seconds == pytest.approx(recorded("total_s", stage=stage), rel=WITHIN)


@pytest.mark.parametrize("stage", SWEPT)
def test_times_of_a_block_without_the_making_of_the_streams(stage: str, seven_b: Shapes) -> None:
    """One block more costs what a block cost: the constants of a stage's beginning do not make good for those of its blocks."""
    config, shapes = sweep_of(stage, seven_b)
    more = estimated(stage, config, dataclasses.replace(shapes, blocks=shapes.blocks + 1)).seconds - estimated(stage, config, shapes).seconds
    assert more == pytest.approx(recorded("stage1_s" if stage == "ptq_init" else "block_s", stage=stage), rel=WITHIN)


@pytest.mark.parametrize("stage", ["weight_distill", "act_quant"])
def test_times_of_a_block_of_few_sequences(stage: str, seven_b: Shapes) -> None:
    """What a block costs whatever its tokens: reading, building, checksum, writing."""
    config, shapes = sweep_of(stage, seven_b)
    few = dataclasses.replace(config, **{stage: dataclasses.replace(getattr(config, stage), sequences=4)})
    more = estimated(stage, few, dataclasses.replace(shapes, blocks=shapes.blocks + 1)).seconds - estimated(stage, few, shapes).seconds
    assert more == pytest.approx(recorded("fixed_s", stage=stage), rel=0.2)


@pytest.mark.parametrize("stage", SWEPT)
def test_memory_of_large_blocks_is_what_was_measured(stage: str, seven_b: Shapes) -> None:
    assert swept(stage, seven_b).device / 1e9 == pytest.approx(recorded("peak_gb", stage=stage, of="sweep"), rel=WITHIN)


@pytest.mark.parametrize("stage", SWEPT)
def test_tensors_of_large_blocks_take_what_was_measured(stage: str, seven_b: Shapes) -> None:
    """Without what the allocator holds beside them and what lies outside of it."""
    config, shapes = sweep_of(stage, seven_b)
    found = estimate_large.initial_tensors(config, shapes) if stage == "ptq_init" else estimate_large.tensors(config, shapes, stage, 4096.0, stage == "act_quant", False)
    assert found[0] / 1e9 == pytest.approx(recorded("allocated_gb", stage=stage), rel=0.05)
    assert found[1] > found[0]


ONE_STEP = {"llama2_7b": "step", "llama2_70b": "step70b"}
STEPS = [("nearest", 2, "llama2_7b"), ("latent", 2, "llama2_7b"), ("nearest", 8, "llama2_7b"), ("nearest", 2, "llama2_70b")]


@pytest.mark.parametrize(("parameterization", "batch", "shape"), STEPS)
def test_memory_of_a_step_is_what_was_measured(parameterization: str, batch: int, shape: str) -> None:
    """The terms of a step in the formula of stage 2, with the states that the measurement itself keeps on the device."""
    shapes = inspect.architecture_shapes(LlamaConfig(**SHAPES[shape], num_hidden_layers=1), 0)
    tokens = float(batch * 2048)
    held = estimate_large.trained_bytes("weight_distill", parameterization == "latent") * shapes.linears + estimate_large.activation_bytes(shapes, tokens)
    kept = 4 * 4.0 * tokens * shapes.hidden  # inputs, targets, and a stream of each
    outside = formulas.DEVICE_BYTES + estimate_large.LIBRARIES
    assert (outside + estimate_large.SLACK * held + kept) / 1e9 == pytest.approx(recorded("peak_gb", of="one step", parameterization=parameterization, batch=batch, shape=shape), rel=WITHIN)


@pytest.mark.parametrize(("parameterization", "batch", "shape"), STEPS)
def test_time_of_a_step_is_what_was_measured(parameterization: str, batch: int, shape: str) -> None:
    """The terms of a step in the formula of stage 2: products, bytes of weights, launches."""
    shapes, rates = inspect.architecture_shapes(LlamaConfig(**SHAPES[shape], num_hidden_layers=1), 0), measured_rates()
    weight_bytes = estimate_large.STEP_BYTES + (parameterization == "latent") * estimate_large.BITMAP_BYTES
    seconds = 3 * batch * 2048 * formulas.forward(shapes, 2048) / rates.matmul_compute + shapes.linears * weight_bytes / rates.traffic + estimate_large.STEP_CALLS * rates.call
    assert 1e3 * seconds == pytest.approx(recorded("step_ms", section=ONE_STEP[shape], parameterization=parameterization, batch=batch, shape=shape), rel=0.1)


def test_stage_3_pins_what_stage_2_has_left(seven_b: Shapes) -> None:
    """The same streams cost nothing again; twice as many, or without stage 2, do."""
    config, shapes = sweep_of("act_quant", seven_b)
    base = estimated("act_quant", config, shapes)
    alone = dataclasses.replace(config, weight_distill=dataclasses.replace(config.weight_distill, enabled=False))
    streams = 2 * 512 * 2048 * 4096 * 2  # bf16
    assert estimated("act_quant", alone, shapes).seconds - base.seconds == pytest.approx(streams / estimate_large.PIN_RATE)
    larger = dataclasses.replace(config, act_quant=dataclasses.replace(config.act_quant, sequences=1024), dataset=dataclasses.replace(config.dataset, sequences=1024))
    assert estimated("act_quant", larger, shapes).seconds > base.seconds + 2 * streams / estimate_large.PIN_RATE


def test_a_large_block_costs_what_it_does(seven_b: Shapes) -> None:
    """What the formulas of large blocks grow with; the same configuration on a CPU keeps the others."""
    base = swept("weight_distill", seven_b)
    assert base.work.overhead == 1
    assert not base.work.whole_teacher
    assert base.work.compute == 4 * 512 * 2048 * 8 * formulas.forward(seven_b, 2048)
