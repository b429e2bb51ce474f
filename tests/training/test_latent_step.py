"""The large block's step and its fused parts against plain autograd, in Triton's interpreter (a process of its own: Triton decides at import)."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from interpreted import INTERPRETED, inside, outside, run_interpreted
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
    from lbllm_core.model.linear import LearningRates
    from lbllm_core.model.student_block import build_block, constrain, parameter_groups, read_state
    from lbllm_core.quant.kv_cache import set_kv_bits
    from lbllm_core.stages.ptq_init import quantize_block

    CPU = Hardware(torch.device("cpu"), torch.float32)


class Meter(TorchDispatchMode):
    """Bytes of tensors that live at once: of those that operations made while it was entered, from `start` on the most."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = 0, 0

    def start(self):
        self.peak = self.live

    def gone(self, size):
        self.live -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(made):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in given:
                storage = t.untyped_storage()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.gone, storage.nbytes())
        return made


def one_block_at_a_time(decoder):
    """A decoder whose blocks are made anew for whoever asks, as those that come from disk."""

    class Blocks(list):
        def __getitem__(self, index):
            return copy.deepcopy(super().__getitem__(index))

    decoder.blocks, decoder.streamed = Blocks(decoder.blocks), True
    return decoder


def small_job(kv_heads=2, hidden=32, ffn=64):
    import transformers

    values = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": kv_heads, "vocab_size": 60}
    config = transformers.LlamaConfig(**values, max_position_embeddings=64)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for p in model.parameters():
        p.copy_(torch.randn_like(p) / p.shape[1] ** 0.5 if p.dim() > 1 else 1 + 0.3 * torch.randn_like(p))
    view = Decoder(model)
    inputs = torch.randn(4, 12, hidden)
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
@pytest.mark.parametrize(("family", "mode"), [("free", "explicit"), ("free", "codebook"), ("affine", "codebook"), ("int2", "explicit"), ("residual", "explicit")])
def test_a_weight_made_by_one_kernel(family, mode, codes_given, monkeypatch):
    from lbllm_core.model import linear
    from lbllm_core.quant.weight import QuantizedWeight, to_grid

    torch.manual_seed(1)
    codes, scale = torch.randint(0, 4, (6, 48), dtype=torch.uint8), torch.rand(6) + 0.5
    if mode == "explicit":
        q = QuantizedWeight(codes, scale, 16, levels=to_grid(127 * torch.randn(6, 3, 4).clamp(-1, 1)).sort(-1).values)
    else:
        entries = to_grid(127 * torch.randn(5, 4).clamp(-1, 1)).sort(-1).values
        q = QuantizedWeight(codes, scale, 16, group_codes=torch.randint(0, 4, (6, 3), dtype=torch.uint8), codebook=entries)
    latent, into, found = 60 * torch.randn(6, 48), torch.randn(6, 48), []
    for fused in (False, True):
        table = None if q.codebook is None else torch.nn.Parameter(q.codebook[:, [2, 0, 3, 1]] / 127)  # stored in any order
        view = linear.FrozenWeight(q, table, family) if codes_given else linear.NearestWeight(q, latent.clone(), table, family)
        view.store.gain.data += 0.1 * torch.arange(6)
        if fused:
            monkeypatch.setattr(linear, "fusable", lambda source, group_size: True)
        made = view()
        made.backward(into)
        found.append((made.detach(), {name: p.grad for name, p in view.named_parameters()}))
        monkeypatch.undo()
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-6)
    assert found[0][1].keys() == found[1][1].keys()
    for name, plain in found[0][1].items():
        assert plain is not None, name
        assert float((plain - found[1][1][name]).norm() / plain.norm()) < 1e-5, name


RATES = {"weight": 1e-3, "levels": 2e-3, "row_scale": 2e-3}


@inside
@pytest.mark.parametrize(
    ("mode", "level_mode", "rates", "polarize", "beta"),
    [
        ("nearest", "explicit", RATES, 0.0, 20.0),
        ("nearest", "codebook", RATES, 0.0, 20.0),
        ("frozen", "explicit", {"levels": 2e-3, "row_scale": 2e-3}, 0.0, 20.0),
        ("latent_soft", "explicit", RATES | {"bitmap": 1e-2}, 0.0, 20.0),
        ("latent_soft", "explicit", RATES | {"bitmap": 1e-2}, 0.3, 20.0),
        ("latent_soft", "explicit", RATES | {"bitmap": 1e-2}, 0.3, 0.5),
        ("latent_hard", "explicit", RATES, 0.0, 20.0),
    ],
)
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_the_step_is_that_of_plain_autograd(mode, level_mode, rates, polarize, beta, clip):
    job, target = small_job()
    scheme = SchemeConfig(level_mode=level_mode, group_size=16, codebook_size=16, act_bits=16)
    start, _ = quantize_block(job, scheme, PtqInitConfig(), 0)
    plan = TrainingPlan(LearningRates(**rates), 1, 4, 0.05, clip, 0, polarize, beta)
    blocks, losses = [], []
    for fused in (False, True):
        block = build_block(job.teacher_block, start, mode)
        pieces = MicroBatches(block, job, plan, 0.7)
        groups = parameter_groups(block, plan.rates)
        if fused:
            assert latent_step.tiled(block)
            pieces.size = 2  # and in micro-batches
            update = LatentStep(block, groups, pieces._pieces, lambda b=block: constrain(b), clip, torch.float32, polarize, (beta, 2.0))
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


def learned_levels(rows, groups):
    """Fractions of 127 in any order: some equal, some beyond the grid, one group with NaN."""
    torch.manual_seed(5)
    levels = 0.8 * torch.randn(rows, groups, 4)
    levels[0] = levels[0, :, :1].expand(-1, 4)
    levels[1, :, 2] = levels[1, :, 0]
    levels[2, :, 3] = 1.7
    levels[3, 0] = torch.tensor([0.5, float("nan"), -0.25, 0.125])
    return levels


@inside
@pytest.mark.parametrize("frozen", [False, True])
def test_learned_levels_are_those_of_the_plain_form(frozen):
    from lbllm_kernels import triton_weights

    from lbllm_core.quant.weight import GRID, nearest_codes, take_levels

    rows, groups, size = 6, 3, 16
    levels, scale = learned_levels(rows, groups).requires_grad_(), torch.rand(rows) + 0.5
    gain = torch.zeros(rows, requires_grad=True)
    real = (levels.sort(dim=-1, stable=True).values * GRID).round().clamp(-GRID, GRID) * scale[:, None, None]
    latent = torch.randn(rows, groups, size) * GRID
    codes = torch.randint(4, latent.shape, dtype=torch.uint8) if frozen else nearest_codes(latent, real)
    expected = take_levels(real, codes).detach()
    source = (codes if frozen else latent).reshape(rows, -1).contiguous()
    made, found = triton_weights.quantized_weight(source, None, levels.detach(), size, torch.float32, scale)
    assert torch.equal(found.nan_to_num(7e7), real.detach().nan_to_num(7e7))
    whole = ~real.detach().isnan().any(-1)
    assert torch.equal(made.view_as(expected)[whole], expected[whole])
    assert bool(found[3, 0].isnan().any())
    grad = torch.randn(rows, groups, size)
    per_code = torch.stack([(grad * (codes == k)).sum(-1) for k in range(4)], -1)
    smooth = levels.sort(dim=-1, stable=True).values * GRID * (scale * gain.exp())[:, None, None]
    keep = whole[..., None].expand(-1, -1, 4)
    to_levels = torch.autograd.grad(smooth, levels, torch.where(keep, per_code, 0.0), retain_graph=True)[0]
    squares = torch.empty(rows * groups)
    sums, to_rows = triton_weights.gradient_sums(grad.view(rows, -1), source, None, found, size, squares, 0 if frozen else 1, (levels.detach(), scale))
    assert torch.allclose(sums[keep], to_levels[keep], rtol=1e-5, atol=1e-4)
    moved = (sums[keep].square().sum() + (0.0 if frozen else grad[whole].square().sum())).item()
    assert float(squares.view(rows, groups)[whole].sum()) == pytest.approx(moved, rel=1e-5)
    by_gain = (per_code * real.detach()).nan_to_num(0.0).sum((1, 2))
    sound = whole.all(1)
    assert torch.allclose(to_rows[sound], by_gain[sound], rtol=1e-4, atol=1e-3)


@inside
def test_memory_of_a_sweep_is_a_few_copies_of_the_block(monkeypatch, tmp_path):
    """Stage 2, streamed: bytes that live at once, in units of the block's weights in float32. On a GPU made weights and gradients are half of theirs."""
    from lbllm_core.config import WeightDistillConfig
    from lbllm_core.engine.block_sweep import SweepPlan, sweep
    from lbllm_core.engine.ledger import Ledger
    from lbllm_core.engine.progress import silent
    from lbllm_core.model.fused_block import weights_of
    from lbllm_core.model.student import load_block, state_tensors
    from lbllm_core.stages.weight_distill import distill_block

    job, _ = small_job(hidden=128, ffn=256)
    scheme = SchemeConfig(level_mode="explicit", group_size=128, act_bits=16)
    start, _ = quantize_block(job, scheme, PtqInitConfig(method="rtn", error_compensation=False), 0)
    Ledger(tmp_path / "start").save(0, state_tensors(start), {})
    monkeypatch.setattr(latent_step, "suits", lambda block, hardware: True)
    meter = Meter()

    def work(given):
        state = load_block(tmp_path / "start", given.index, "none")
        meter.start()
        return distill_block(given, state, scheme, WeightDistillConfig(epochs=1, batch_size=1), 0)

    ids = torch.randint(60, (2, 4), generator=torch.Generator().manual_seed(0))
    decoder = one_block_at_a_time(job.decoder)
    with meter:
        sweep(decoder, ids, work, SweepPlan("weight_distill", True), Ledger(tmp_path / "made"), CPU, silent)
    copies = meter.peak / (4 * weights_of(job.teacher_block))
    # latent 1, moments 2, made weight 1, its gradient 1; the state that was read 1.25 (on the host otherwise); levels and theirs, activations 0.2
    assert 6.2 < copies < 6.8, f"{copies:.2f} copies of the block's weights live at once: the table in engine/block_sweep.py has five, and the state"


@inside
def test_two_processes_make_the_steps_of_one():
    """Each with half of the batch, gradients on their way before the backward pass is over, in one micro-batch and in two."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(Path(__file__).with_name("two_ranks.py"))]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 2


@inside
@pytest.mark.parametrize("variant", ["uniform", "piecewise"])
@pytest.mark.parametrize(("channels", "at_once"), [(48, 4096), (64, 4096), (72, 32)])
def test_fused_activation_quantizer(variant, channels, at_once, monkeypatch):
    from lbllm_kernels import triton_activation

    from lbllm_core.quant import activation

    monkeypatch.setattr(triton_activation, "WIDEST", at_once)
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
from lbllm_kernels import triton_activation as a
from lbllm_kernels import triton_block as b
from lbllm_kernels import triton_divergence as d
from lbllm_kernels import triton_weights as t
types = dict.fromkeys(("grad", "delta", "gate", "up", "to_gate", "to_up", "to_delta", "out"), "*bf16") | {"x": "*fp32", "source": "*fp32"}
types |= dict.fromkeys(("groups", "per_row", "total", "tokens", "channels"), "i32")
types |= dict.fromkeys(("weight", "rate", "rate_bitmap", "correction1", "correction2", "eps", "sign"), "fp32")
adam = dict(BETA1=0.9, BETA2=0.95, EPS=1e-8)
modes = [(0, True, False), (0, True, True), (0, False, False), (1, True, False), (1, True, True), (1, False, False), (2, False, False)]
special = [{"group_codes": "*u8"}, {"group_codes": "*u8", "source": "*u8"}, {"group_codes": "*u8"}]
cases = [(t._quantized_weight, dict(G=128, ROWS=16, MODE=mode, LEARNED=learned, TABLE=table), special[mode]) for mode, learned, table in modes]
cases += [(t._gradient_sums, dict(G=128, ROWS=16, MODE=mode, POLARIZE=mode == 2, LEARNED=learned, TABLE=table, MOVING=(1, 0, 2)[mode]), special[mode]) for mode, learned, table in modes]
cases += [(t._entry_sums, dict(BLOCK=128), {"order": "*i32", "starts": "*i32"})]
cases += [(t._adamw, dict(G=128, ROWS=16, MODE=mode, POLARIZE=mode == 2, **adam), {}) for mode in (0, 2)]
norm = {"weight": "*fp32"}
cases += [(b._norm_forward, dict(WIDTH=4096, BLOCK=4096, ADD=add), norm) for add in (False, True)]
cases += [(b._norm_backward, dict(WIDTH=8192, BLOCK=8192, ADD=add), norm) for add in (False, True)]
cases += [(b._rotated, dict(HEADS=32, HALF=64, ROUND_HEADS=32, ROUND_HALF=64), {"x": "*bf16"})]
cases += [(d._divergence_rows, dict(BLOCK=4096), {"mine": "*bf16", "theirs": "*bf16", "columns": "i32"})]
cases += [(b._gate_forward, dict(BLOCK=2048), {}), (b._gate_backward, dict(BLOCK=2048), {})]
quant = {"x": "*bf16", "to_x": "*bf16", "smallest": "fp32", "channels": "i32"}
cases += [(k, dict(TOP=top, BLOCK=block), quant) for k, widest in ((a._fake_quantized, 16384), (a._fake_quantized_backward, a.WIDEST)) for top, block in ((15, 4096), (127, widest))]
for kernel, constants, special in cases:
    kinds = {a: "constexpr" if a in constants else (types | special).get(a, "*fp32") for a in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if kinds[a].startswith("*") or a in ("total", "groups", "tokens", "channels", "columns")}
    warps = b.warps(constants["BLOCK"]) if "WIDTH" in constants or "TOP" in constants else 4  # as they are launched
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
