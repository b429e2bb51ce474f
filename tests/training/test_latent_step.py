"""The large block's step and its fused parts against plain autograd, in Triton's interpreter (a process of its own: Triton decides at import)."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from interpreted import INTERPRETED, inside, outside, run_interpreted


@outside
def test_the_interpreted_cases_pass():
    run_interpreted(__file__)


@outside
@pytest.mark.parametrize("mode", ["nearest", "frozen", "fixed"])
def test_weights_of_a_block_are_counted_whatever_its_linears_are(tiny_teacher, mode):
    from lbllm_core.config import PtqInitConfig, SchemeConfig
    from lbllm_core.engine.block_sweep import BlockJob
    from lbllm_core.engine.hardware import Hardware
    from lbllm_core.engine.hidden_states import HiddenStates
    from lbllm_core.model.blocks import Decoder
    from lbllm_core.model.fused_block import weights_of
    from lbllm_core.model.student_block import build_block
    from lbllm_core.stages.ptq_init import quantize_block

    view = Decoder(tiny_teacher.model)
    inputs = view.embed(torch.arange(32)[None]).float()
    job = BlockJob(0, view.blocks[0], HiddenStates.of(inputs), None, view, view.surroundings(inputs), Hardware(torch.device("cpu"), torch.float32))
    state, _ = quantize_block(job, SchemeConfig(level_mode="explicit"), PtqInitConfig(method="rtn", error_compensation=False), 0)
    assert weights_of(build_block(view.blocks[0], state, mode)) == weights_of(view.blocks[0]) == sum(q.codes.numel() for q in state.linears.values())


if INTERPRETED:
    from lbllm_core.config import PtqInitConfig, SchemeConfig
    from lbllm_core.engine import latent_step
    from lbllm_core.engine.block_sweep import BlockJob
    from lbllm_core.engine.hardware import Hardware
    from lbllm_core.engine.hidden_states import HiddenStates
    from lbllm_core.engine.latent_step import LatentStep
    from lbllm_core.engine.recorded_step import RecordedStep
    from lbllm_core.engine.train_block import MicroBatches, TrainingPlan
    from lbllm_core.model import fused_block
    from lbllm_core.model.blocks import NORMS, Decoder
    from lbllm_core.model.linear import LearningRates, _FusedSelect, _Select
    from lbllm_core.model.student_block import build_block, constrain, parameter_groups, read_state
    from lbllm_core.quant.kv_cache import set_kv_bits
    from lbllm_core.stages.ptq_init import quantize_block

    CPU = Hardware(torch.device("cpu"), torch.float32)


def small_job(kv_heads=2):
    import transformers

    values = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": kv_heads, "vocab_size": 60}
    config = transformers.LlamaConfig(**values, max_position_embeddings=64)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for p in model.parameters():
        p.copy_(torch.randn_like(p) / p.shape[1] ** 0.5 if p.dim() > 1 else 1 + 0.3 * torch.randn_like(p))
    view = Decoder(model)
    inputs = torch.randn(4, 12, 32)
    job = BlockJob(0, view.blocks[0], HiddenStates.of(inputs), None, view, view.surroundings(inputs[:1]), CPU)
    return job, HiddenStates.of(job.run(view.blocks[0], inputs))


@inside
@pytest.mark.parametrize(("norms", "kv_bits"), [(False, 16), (True, 16), (True, 4)])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_fused_forward_and_backward(kv_heads, norms, kv_bits):
    job, _ = small_job(kv_heads)
    assert fused_block.plain(job.teacher_block, job.surroundings)
    found = []
    for run in (lambda b, h: job.run(b, h), lambda b, h: fused_block.run(b, h, job.surroundings, torch.float32)):
        block = copy.deepcopy(job.teacher_block)
        for module in block.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.requires_grad_(True)
        for name in NORMS:
            block.get_submodule(name).weight.requires_grad_(norms)
        set_kv_bits(block, kv_bits)
        hidden = job.inputs.whole().clone().requires_grad_()
        out = run(block, hidden)
        (out * torch.sin(torch.arange(out.numel())).view_as(out)).sum().backward()
        found.append([out, hidden.grad, *(p.grad for p in block.parameters() if p.requires_grad)])
    for plain, fused in zip(*found, strict=True):
        assert float((plain - fused).norm() / plain.norm()) < 2e-6


@inside
@pytest.mark.parametrize("vocabulary", [60, 5000])
def test_divergence_and_its_gradient_by_one_kernel(vocabulary, monkeypatch):
    from lbllm_core.stages import divergence

    monkeypatch.setattr(divergence, "FUSED_ROWS", 3)
    torch.manual_seed(2)
    mine, theirs, head = torch.randn(7, 16), torch.randn(7, 16), torch.randn(vocabulary, 16)
    found = []
    for fused in (False, True):
        x = mine.clone().requires_grad_()
        if fused:
            loss = divergence._Divergence.apply(x, theirs, head)
        else:
            wide, target = (x @ head.T).double(), (theirs @ head.T).double().log_softmax(-1)
            loss = torch.nn.functional.kl_div(wide.log_softmax(-1), target, log_target=True, reduction="sum") / 7
        (3 * loss).backward()
        found.append((loss.detach().float(), x.grad))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5)
    assert float((found[0][1] - found[1][1]).norm() / found[0][1].norm()) < 1e-5


@inside
@pytest.mark.parametrize("codes_given", [False, True])
def test_a_weight_made_by_one_kernel(codes_given):
    from lbllm_core.quant.weight import nearest_codes

    torch.manual_seed(1)
    levels = torch.randn(6, 3, 4).sort(-1).values
    latent, into = torch.randn(6, 48), torch.randn(6, 48)
    codes = nearest_codes(latent.view(6, 3, 16), levels)
    found = []
    for fused in (False, True):
        w, at = latent.clone().requires_grad_(not codes_given), levels.clone().requires_grad_()
        if fused:
            made = _FusedSelect.apply(codes.view(6, 48) if codes_given else w, at, 16, torch.float32)
        else:
            made = _Select.apply(None if codes_given else w.view(6, 3, 16), at, codes).view(6, 48)
        made.backward(into)
        found.append((made, at.grad, w.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5)
    assert codes_given or torch.equal(found[0][2], found[1][2])


RATES = {"weight": 1e-3, "levels": 2e-3, "row_scale": 2e-3}


@inside
@pytest.mark.parametrize(
    ("mode", "level_mode", "rates", "polarize"),
    [
        ("nearest", "explicit", RATES, 0.0),
        ("nearest", "codebook", RATES, 0.0),
        ("frozen", "explicit", {"levels": 2e-3, "row_scale": 2e-3}, 0.0),
        ("latent_soft", "explicit", RATES | {"bitmap": 1e-2}, 0.0),
        ("latent_soft", "explicit", RATES | {"bitmap": 1e-2}, 0.3),
        ("latent_hard", "explicit", RATES, 0.0),
    ],
)
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_the_step_is_that_of_plain_autograd(mode, level_mode, rates, polarize, clip):
    job, target = small_job()
    scheme = SchemeConfig(level_mode=level_mode, group_size=16, codebook_size=16, act_bits=16)
    start, _ = quantize_block(job, scheme, PtqInitConfig(), 0)
    plan = TrainingPlan(LearningRates(**rates), 1, 4, 0.05, clip, 0, polarize)
    blocks, losses = [], []
    for fused in (False, True):
        block = build_block(job.teacher_block, start, mode)
        pieces = MicroBatches(block, job, plan, 0.7)
        groups = parameter_groups(block, plan.rates)
        if fused:
            assert latent_step.tiled(block)
            pieces.size = 2  # and in micro-batches
            update = LatentStep(block, groups, pieces._pieces, lambda b=block: constrain(b), clip, torch.float32, polarize)
        else:
            update = RecordedStep(groups, pieces._gradients, lambda b=block: constrain(b), clip, torch.device("cpu"))
        progress = torch.zeros(())
        losses.append([float(update(1.0 - 0.2 * k, job.inputs.whole(), target.whole(), progress.fill_(k / 4))) for k in range(4)])
        blocks.append(block)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
    for (name, a), (_, b) in zip(blocks[0].named_parameters(), blocks[1].named_parameters(), strict=True):
        assert float((a - b).abs().max()) < 2e-4, name
    codes = [read_state(block, start).linears for block in blocks]
    assert sum(int((codes[0][p].codes != codes[1][p].codes).sum()) for p in codes[0]) <= 3


@inside
@pytest.mark.parametrize("variant", ["uniform", "piecewise"])
@pytest.mark.parametrize("channels", [48, 64])
def test_fused_activation_quantizer(variant, channels, monkeypatch):
    from lbllm_core.quant import activation

    torch.manual_seed(3)
    x = torch.randn(2, 9, channels) * torch.exp(torch.randn(channels))
    x[0, 0] = 0.0
    x[0, 1] = x[0, 1].abs()
    x[1, 2] = -x[1, 2].abs()
    upstream, found = torch.randn_like(x), []
    for fused in (False, True):
        monkeypatch.setattr(activation, "_fused", lambda *_, answer=fused: answer)
        mine = x.clone().requires_grad_()
        factors = [torch.tensor(v).requires_grad_() for v in (0.83, 0.9, 0.21, 0.3)]
        out = activation.fake_quantize(mine, variant, *factors)
        out.backward(upstream)
        found.append((out, mine.grad, *(f.grad for f in factors)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    for plain, fused in zip(found[0][2:4] if variant == "uniform" else found[0][2:], found[1][2:], strict=False):
        assert float(fused) == pytest.approx(float(plain), rel=1e-4, abs=1e-4)


AHEAD = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lbllm_kernels import triton_divergence as d
from lbllm_kernels import triton_training as t
types = dict.fromkeys(("grad", "delta", "gate", "up", "to_gate", "to_up", "to_delta", "out"), "*bf16") | {"x": "*fp32", "source": "*fp32"}
types |= dict.fromkeys(("groups", "total", "tokens", "channels"), "i32")
types |= dict.fromkeys(("weight", "rate", "rate_bitmap", "correction1", "correction2", "eps", "sign"), "fp32")
adam = dict(BETA1=0.9, BETA2=0.95, EPS=1e-8)
cases = [(t._quantized_weight, dict(G=128, ROWS=16, MODE=mode), {"source": "*u8"} if mode == 1 else {}) for mode in (0, 1, 2)]
cases += [(t._gradient_sums, dict(G=128, ROWS=16, MODE=mode, POLARIZE=mode == 2), {"source": "*u8"} if mode == 1 else {}) for mode in (0, 1, 2)]
cases += [(t._adamw, dict(G=128, ROWS=16, MODE=mode, POLARIZE=mode == 2, **adam), {}) for mode in (0, 2)]
norm = {"weight": "*fp32"}
cases += [(t._norm_forward, dict(WIDTH=4096, BLOCK=4096, ADD=add), norm) for add in (False, True)]
cases += [(t._norm_backward, dict(WIDTH=8192, BLOCK=8192, ADD=add), norm) for add in (False, True)]
cases += [(t._rotated, dict(HEADS=32, HALF=64, ROUND_HEADS=32, ROUND_HALF=64), {"x": "*bf16"})]
cases += [(d._divergence_rows, dict(BLOCK=4096), {"mine": "*bf16", "theirs": "*bf16", "columns": "i32"})]
cases += [(t._gate_forward, dict(BLOCK=2048), {}), (t._gate_backward, dict(BLOCK=2048), {})]
quant = {"x": "*bf16", "to_x": "*bf16", "smallest": "fp32", "channels": "i32"}
cases += [(k, dict(TOP=top, BLOCK=block), quant) for k in (t._fake_quantized, t._fake_quantized_backward) for top, block in ((15, 4096), (127, 16384))]
for kernel, constants, special in cases:
    kinds = {a: "constexpr" if a in constants else (types | special).get(a, "*fp32") for a in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if kinds[a].startswith("*") or a in ("total", "groups", "tokens", "channels")}
    warps = 16 if constants.get("BLOCK", 0) > 4096 else 4
    made = triton.compile(ASTSource(kernel, kinds, constants, aligned), target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": warps})
    assert len(made.asm["cubin"]) > 1000
    assert ".local" not in made.asm["ptx"], (kernel.__name__, constants)
    assert "ld.global.v4" in made.asm["ptx"] or "ld.global.L1" in made.asm["ptx"] or ".v4.b32" in made.asm["ptx"], (kernel.__name__, constants)
print("compiled", len(cases))
"""


@pytest.mark.skipif(INTERPRETED, reason="runs in the outer process")
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_ahead_of_time(capability, tmp_path):
    """Without a GPU: every kernel compiles, loads sixteen bytes a thread, and spills nothing to local memory."""
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", AHEAD, str(capability)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("compiled ")
