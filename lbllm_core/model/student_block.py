"""Building a block that computes with its quantized weights and activations.

The student block is a copy of the teacher block with three changes: its norms carry the smoothed weights, its seven linears
are `QuantLinear`, and where activations are quantized an `ActQuantizer` stands in front of each site: behind the two norms
(whose output feeds only q/k/v, or only gate/up) and before o_proj and down_proj.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lbllm_kernels.activation import ActFactors
from torch import Tensor, nn

from lbllm_core.model.blocks import NORMS, SITE_OF, Decoder, linears_of_site
from lbllm_core.model.linear import FrozenWeight, LatentBitmapWeight, LearningRates, NearestWeight, QuantLinear
from lbllm_core.model.smoothing import NORM_OF_SITE
from lbllm_core.model.student import BlockState
from lbllm_core.quant import activation
from lbllm_core.quant.activation import ActQuantizer
from lbllm_core.quant.kv_cache import set_kv_bits
from lbllm_core.quant.weight import GRID

Mode = Literal["nearest", "latent_soft", "latent_hard", "frozen", "fixed"]


class _Tensor(nn.Module):
    """A linear with a plain, fixed weight: what a finished block needs for the forward pass."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)  # type: ignore[arg-type]


def build_block(
    teacher_block: nn.Module, state: BlockState, mode: Mode, kv_bits: int = 16, family: str = "free", pairing: str = "low_high", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A student block on the teacher block's device.

    mode: `nearest` and `latent_*` train from `state.latents`; `frozen` trains levels only; `fixed` trains nothing and keeps weights in `dtype`.
    family: what levels are rounded to while they train (`quant/uniform.py`; `real`: nothing). pairing: of latent bitmaps (`model/linear.py`).
    """
    device = next(teacher_block.parameters()).device
    block = _copy_without_linears(teacher_block)
    tables: dict[int, nn.Parameter] = {}
    for path, q in state.linears.items():
        q = q.to(device)
        bias = state.biases[path].to(device) if path in state.biases else None
        table = _shared_table(tables, state, path, device)
        linear: nn.Module
        if mode == "fixed":
            linear = _Tensor(QuantLinear(FrozenWeight(q, table), None, q.outliers).weight().detach().to(dtype), bias)
        elif mode == "frozen":
            linear = QuantLinear(FrozenWeight(q, table, family), bias, q.outliers)
        elif mode == "nearest":
            linear = QuantLinear(NearestWeight(q, state.latents[path].to(device), table, family), bias, q.outliers)
        else:
            linear = QuantLinear(LatentBitmapWeight(q, state.latents[path].to(device), mode == "latent_soft", pairing), bias, q.outliers)
        _replace(block, path, linear)
    for norm in NORMS:
        module: Any = block.get_submodule(norm)
        module.weight.data = state.norms[norm].to(device=device, dtype=module.weight.dtype, copy=True)
        module.weight.requires_grad_(False)
    for site, factors in state.sites.items():
        if factors.variant != "none":
            _insert_quantizer(block, site, _quantizer(state, site, factors).to(device))
    set_kv_bits(block, kv_bits)
    return block


def _copy_without_linears(block: nn.Module) -> nn.Module:
    """A deep copy that shares the linears' tensors with the original (they are about to be replaced)."""
    memo: dict[int, Any] = {}
    for path in SITE_OF:
        linear = block.get_submodule(path)
        memo[id(linear)] = linear
    for module in block.modules():  # the transformers config is shared, not copied
        config = getattr(module, "config", None)
        if config is not None:
            memo[id(config)] = config
    return copy.deepcopy(block, memo)


def _shared_table(tables: dict[int, nn.Parameter], state: BlockState, path: str, device: torch.device) -> nn.Parameter | None:
    """One parameter for linears of a site that hold equal tables."""
    codebook = state.linears[path].codebook
    if codebook is None:
        return None
    for other, q in state.linears.items():
        if other == path:
            break
        if SITE_OF[other] == SITE_OF[path] and q.codebook is not None and torch.equal(q.codebook, codebook):
            tables[id(codebook)] = tables[id(q.codebook)]
            break
    if id(codebook) not in tables:
        tables[id(codebook)] = nn.Parameter(codebook.to(device) / GRID)
    return tables[id(codebook)]


def _replace(block: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, module)


def _quantizer(state: BlockState, site: str, factors: ActFactors) -> ActQuantizer:
    outliers = state.linears[linears_of_site(site)[0]].outliers  # linears of a site see one input: they agree
    return ActQuantizer(factors, None if outliers is None else outliers.channels)


def _insert_quantizer(block: nn.Module, site: str, quantizer: ActQuantizer) -> None:
    if site in NORM_OF_SITE:
        _replace(block, NORM_OF_SITE[site], nn.Sequential(block.get_submodule(NORM_OF_SITE[site]), quantizer))
    else:
        path = "self_attn.o_proj" if site == "o" else "mlp.down_proj"
        _replace(block, path, nn.Sequential(quantizer, block.get_submodule(path)))


def fake_quant_model(teacher: nn.Module, states: Sequence[BlockState], kv_bits: int) -> nn.Module:
    """A transformers model that computes with quantized weights in float arithmetic: what the packed model is held against.

    Its modules have the teacher's names, and each linear quantizes its own input, as a packed linear does. Embedding, norm
    and head are shared with the teacher.
    """
    view = Decoder(teacher)
    memo: dict[int, Any] = {id(t): t for t in (*teacher.parameters(), *teacher.buffers())}
    for block in view.blocks:
        memo[id(block)] = block
    model = copy.deepcopy(teacher, memo)
    layers: Any = model.model.layers  # type: ignore[union-attr]
    for index, (block, state) in enumerate(zip(view.blocks, states, strict=True)):
        layers[index] = fake_quant_block(block, state, kv_bits)
    return model.eval()


def fake_quant_block(block: nn.Module, state: BlockState, kv_bits: int) -> nn.Module:
    """A block of `fake_quant_model`, on the teacher block's device."""
    plain, device = build_block(block, replace(state, sites={}), "fixed", kv_bits), next(block.parameters()).device
    for path, site in SITE_OF.items():
        if site in state.sites:
            _replace(plain, path, nn.Sequential(_quantizer(state, site, state.sites[site]).to(device), plain.get_submodule(path)))
    return plain.eval()


def quant_linears(block: nn.Module) -> dict[str, QuantLinear]:
    """The trainable linears of a student block by their path in the teacher block."""
    found = {}
    for path in SITE_OF:
        module = block.get_submodule(path)
        found[path] = module[1] if isinstance(module, nn.Sequential) else module
    return found  # type: ignore[return-value]


def quantizers(block: nn.Module) -> Iterator[tuple[str, ActQuantizer]]:
    """The activation quantizers of a student block by site."""
    for site in ("qkv", "o", "gate_up", "down"):
        place = NORM_OF_SITE.get(site) or {"o": "self_attn.o_proj", "down": "mlp.down_proj"}[site]
        for module in block.get_submodule(place).children():
            if isinstance(module, ActQuantizer):
                yield site, module


def parameter_groups(block: nn.Module, rates: LearningRates) -> list[dict[str, Any]]:
    """Optimizer groups, one a kind of parameter; whatever has no rate is frozen. Shared tables appear once."""
    kinds: dict[str, dict[int, nn.Parameter]] = {}
    norms = {id(norm_of(block, name).weight) for name in NORMS}
    for name, parameter in block.named_parameters():
        kind = "norms" if id(parameter) in norms else _kind_of(name)
        rate = getattr(rates, kind) if kind else 0.0
        parameter.requires_grad_(rate > 0)
        if rate > 0:
            kinds.setdefault(kind, {})[id(parameter)] = parameter
    return [{"params": list(found.values()), "lr": getattr(rates, kind), "kind": kind} for kind, found in kinds.items()]


def norm_of(block: nn.Module, name: str) -> Any:
    """A norm of a student block, whether or not a quantizer stands behind it."""
    module: Any = block.get_submodule(name)
    return module[0] if isinstance(module, nn.Sequential) else module


def _kind_of(name: str) -> str:
    leaf = name.rpartition(".")[2]
    table = {"latent": "weight", "levels": "levels", "table": "levels", "gain": "row_scale", "bitmap": "bitmap"}
    table |= {"clip_max": "clips", "clip_min": "clips", "knee_low": "knees", "knee_high": "knees"}
    return table.get(leaf, "")


def read_state(block: nn.Module, start: BlockState) -> BlockState:
    """The trained block as a value; everything that was not trained comes from `start`. Latent weights stay with it: stage 4 may move them."""
    linears = {path: linear.quantized() for path, linear in quant_linears(block).items()}
    sites = {**start.sites, **{site: quantizer.factors() for site, quantizer in quantizers(block)}}
    latents = dict(start.latents)
    for path, linear in quant_linears(block).items():
        if isinstance(linear.weight_view, (NearestWeight, LatentBitmapWeight)):
            latents[path] = linear.weight_view.latent.detach().clone()
    norms = {name: norm_of(block, name).weight.detach().float().clone() for name in NORMS}
    return BlockState(linears=linears, norms=norms, biases=start.biases, sites=sites, latents=latents)


def constrain(block: nn.Module, bitmaps: bool = True) -> None:
    """Project parameters back to where they mean something; after each optimizer step. Without `bitmaps` where the step has kept those in range."""
    activation.constrain([module for module in block.modules() if isinstance(module, ActQuantizer)])
    for module in block.modules():
        if bitmaps and isinstance(module, LatentBitmapWeight):
            module.constrain()
