"""A quantized block as a value, and as a file.

Stages hand each other *block states*: the seven quantized linears, the norms that smoothing changed, biases, and the factors
of each activation site. A stage's result is a folder with one safetensors file a block and a `student.json`; packing reads it.
Codes are stored packed, four to a byte; the weights behind them (`latent`, float16: compensated in stage 1, trained in stage 2) go along, so that a later
stage can start from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from lbllm_kernels.activation import ActFactors, factors_of
from lbllm_kernels.format import pack_codes, unpack_codes
from torch import Tensor

from lbllm_core.model.blocks import NORMS, SITE_OF, SITES
from lbllm_core.quant.weight import OutlierColumns, QuantizedWeight


@dataclass(frozen=True)
class BlockState:
    """Everything that distinguishes a student block from its teacher block."""

    linears: dict[str, QuantizedWeight]  # path -> weight
    norms: dict[str, Tensor]  # norm name -> (hidden,) float32
    biases: dict[str, Tensor] = field(default_factory=dict)  # path -> (out,) float32, only where the teacher has one
    sites: dict[str, ActFactors] = field(default_factory=dict)  # site -> factors; absent: activations stay as they are
    latents: dict[str, Tensor] = field(default_factory=dict)  # path -> (out, in) full-precision weights that the codes were chosen for


def state_tensors(state: BlockState) -> dict[str, Tensor]:
    """The tensors of a block file by name (contiguous, on the CPU)."""
    made: dict[str, Tensor] = {}
    for path, q in state.linears.items():
        made[f"{path}.codes"] = pack_codes(q.codes)
        made[f"{path}.row_scale"] = q.row_scale.float()
        if q.levels is not None:
            made[f"{path}.levels"] = q.levels.float()
        else:
            assert q.group_codes is not None
            assert q.codebook is not None
            made[f"{path}.group_codes"] = q.group_codes
            made[f"{path}.codebook"] = q.codebook.float().clone()  # linears of a site share it
        if q.outliers is not None:
            made |= {f"{path}.outliers.{name}": t.clone() for name, t in vars(q.outliers).items()}  # linears of a site share the order
        made[f"{path}.shape"] = torch.tensor([*q.codes.shape, q.group_size])
    made |= {f"{path}.bias": bias.float() for path, bias in state.biases.items()}
    made |= {f"{path}.latent": latent.half() for path, latent in state.latents.items()}
    made |= {f"{norm}.weight": weight.float() for norm, weight in state.norms.items()}
    for site, f in state.sites.items():
        made[f"site.{site}"] = torch.tensor(f.numbers(), dtype=torch.float32)
    return {name: t.detach().cpu().contiguous() for name, t in made.items()}


def state_from_tensors(tensors: dict[str, Tensor], variant: str) -> BlockState:
    """Inverse of `state_tensors`; `variant` names the activation quantizer, whose numbers the file holds."""
    linears, biases, latents = {}, {}, {}
    for path in SITE_OF:
        _, columns, group_size = tensors[f"{path}.shape"].tolist()
        linears[path] = QuantizedWeight(
            codes=unpack_codes(tensors[f"{path}.codes"], columns),
            row_scale=tensors[f"{path}.row_scale"],
            group_size=group_size,
            levels=tensors.get(f"{path}.levels"),
            group_codes=tensors.get(f"{path}.group_codes"),
            codebook=tensors.get(f"{path}.codebook"),
            outliers=OutlierColumns(*(tensors[f"{path}.outliers.{name}"] for name in ("perm", "weight", "scale"))) if f"{path}.outliers.perm" in tensors else None,
        )
        if f"{path}.bias" in tensors:
            biases[path] = tensors[f"{path}.bias"]
        if f"{path}.latent" in tensors:
            latents[path] = tensors[f"{path}.latent"].float()
    sites = {}
    for site in SITES:
        if f"site.{site}" in tensors:
            sites[site] = factors_of(variant, tensors[f"site.{site}"].tolist())
    norms = {norm: tensors[f"{norm}.weight"] for norm in NORMS}
    return BlockState(linears=linears, norms=norms, biases=biases, sites=sites, latents=latents)


def block_file(folder: Path, index: int) -> Path:
    """Where block `index` lies in a student folder."""
    return folder / f"block_{index:03d}.safetensors"


def load_block(folder: Path, index: int, variant: str, latents: bool = True) -> BlockState:
    """One block of a finished student folder; without the weights behind its codes where only the codes are asked for."""
    from safetensors import safe_open

    with safe_open(block_file(folder, index), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if latents or not name.endswith(".latent")}  # noqa: SIM118 (it is no dictionary)
    return state_from_tensors(tensors, variant)
