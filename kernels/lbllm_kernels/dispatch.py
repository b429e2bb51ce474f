"""Which path a packed linear layer takes, and why.

**Problem.** The same folder runs on machines with and without a compiler, with old and new processors, with and without GPUs. Each
layer must take the fastest path that computes exactly the reference's integers, and be able to say which one and for what reason:
silent fallbacks are how benchmarks lie.

**How.** `thresholds.json` holds, for each kind of device, ranges of tokens and the paths to try in each, best first; `measured` says
whether a benchmark on that kind of device put them there. Kinds are tried from the narrow to the wide: `cuda sm_90`, then `cuda`. In
each range the first path wins that is present and takes the weight (`paths.py`); the reference is always last. `plan` returns the
routes and the reason; `prepare` derives each path's layout once; `quantize`, `linear`, `accumulate` run them.

`LBLLM_KERNEL_PATH=<name>` forces one path, by name, for every layer: tests, measurements, fault finding. It fails, with the reason,
where the path cannot be had; it never falls back.

**Trade-off.** A device kind whose ranges name two paths keeps two layouts of the weight. Ranges are few, layouts are 2 bits a weight.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor

from lbllm_kernels import cpu, reference
from lbllm_kernels.activation import ActFactors
from lbllm_kernels.format import PackedWeight
from lbllm_kernels.paths import PATHS, REFERENCE, Path

PATH_VARIABLE = "LBLLM_KERNEL_PATH"
TABLE = FilePath(__file__).with_name("thresholds.json")


class PathError(RuntimeError):
    """A path was asked for by name and cannot be had; the message says why."""


@dataclass(frozen=True)
class Choice:
    """A path's name (of the first range, and of the others where they differ) and the reason it was taken."""

    path: str
    reason: str


@dataclass(frozen=True)
class Route:
    """Up to `up_to` tokens (None: any number) go through `path`; `weight` is in its layout once prepared."""

    up_to: int | None
    path: Path
    weight: Any = None


@dataclass(frozen=True)
class Prepared:
    """A packed weight ready for its paths. `stored` is None where the first route's layout can give the stored tensors back."""

    in_features: int
    out_features: int
    device: torch.device
    choice: Choice
    routes: tuple[Route, ...]
    bias: Tensor | None
    stored: PackedWeight | None
    has_outliers: bool

    @property
    def packed(self) -> PackedWeight:
        """The stored tensors (made again where they were given up)."""
        if self.stored is not None:
            return self.stored
        assert self.routes[0].path.restore is not None
        return self.routes[0].path.restore(self.routes[0].weight)

    def route(self, tokens: int) -> Route:
        """The route of so many tokens."""
        routes = self.routes
        if len(routes) == 1:
            return routes[0]
        return next(route for route in routes if route.up_to is None or tokens <= route.up_to)

    @property
    def cpu_weight(self) -> cpu.CpuWeight | None:
        """The layout of the C++ path, where that is the path."""
        weight = self.routes[0].weight
        return weight if isinstance(weight, cpu.CpuWeight) else None


@functools.cache
def table() -> dict[str, Any]:
    """The content of thresholds.json: kind of device -> `measured`, `ranges`."""
    read: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return read


def device_kinds(device: torch.device) -> list[str]:
    """Names under which a device may stand in the table, narrow ones first."""
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        return [f"cuda sm_{major}{minor}", "cuda"]
    return [device.type]


def plan(packed: PackedWeight, variant: str) -> tuple[tuple[Route, ...], Choice]:
    """The routes of a weight with activations of `variant`, and the choice to report. PathError when a forced path cannot be had."""
    forced = os.environ.get(PATH_VARIABLE, "")
    if forced:
        return _forced(forced, packed, variant)
    if variant == "none":
        return (Route(None, REFERENCE),), Choice("reference", "activations are not quantized")
    kind = next((k for k in device_kinds(packed.codes.device) if k in table()), "")
    ranges = table()[kind]["ranges"] if kind else [{"up_to": None, "paths": []}]
    routes: list[Route] = []
    passed: dict[str, tuple[bool, str]] = {}
    for entry in ranges:
        path = _first(entry["paths"], packed, variant, passed)
        if routes and routes[-1].path is path:
            routes.pop()
        routes.append(Route(entry["up_to"], path))
    return tuple(routes), Choice(_names(routes), _reason(routes, kind or str(packed.codes.device), passed))


def _first(names: list[str], packed: PackedWeight, variant: str, passed: dict[str, tuple[bool, str]]) -> Path:
    """The first path of the list that is here and takes weight and activations, else the reference.

    `passed` collects the others: whether they are here, and why they were passed over.
    """
    for name in names:
        if name not in PATHS:
            passed[name] = False, "not part of this build"
            continue
        path = PATHS[name]
        present, why = path.state()
        refused = _refusal(path, packed, variant) if present else why
        if refused is None:
            return path
        passed[name] = present, refused
    return REFERENCE


def _refusal(path: Path, packed: PackedWeight, variant: str) -> str | None:
    """Why a path that is here does not take this weight with these activations, or None."""
    if variant == "none":
        return None if path is REFERENCE else "activations are not quantized"
    return path.unsupported(packed) if variant in path.variants else f"{variant} activations"


def _names(routes: list[Route]) -> str:
    if len(routes) == 1:
        return routes[0].path.name
    return ", ".join(f"{r.path.name} up to {r.up_to} tokens" if r.up_to is not None else f"{r.path.name} beyond" for r in routes)


def _reason(routes: list[Route], kind: str, passed: dict[str, tuple[bool, str]]) -> str:
    if all(r.path is REFERENCE for r in routes):
        refused = [why for here, why in passed.values() if here] or [why for _, why in passed.values()]
        return "; ".join(dict.fromkeys(refused)) or f"no path for weights on {kind}"
    found = [r.path.state()[1] for r in routes]
    reason = "; ".join(dict.fromkeys(found))
    if not table()[kind]["measured"]:
        reason += f"; thresholds of {kind} not measured"
    if passed:
        reason += " (not " + ", ".join(f"{name}: {why}" for name, (_, why) in passed.items()) + ")"
    return reason


def _forced(name: str, packed: PackedWeight, variant: str) -> tuple[tuple[Route, ...], Choice]:
    if name not in PATHS:
        raise PathError(f"{PATH_VARIABLE}={name} names no path; choose one of {', '.join(PATHS)}, or unset it")
    path = PATHS[name]
    present, why = path.state()
    refused = _refusal(path, packed, variant) if present else why
    if refused is not None:
        raise PathError(f"{PATH_VARIABLE}={name} cannot be had: {refused}; unset it to let dispatch choose")
    return (Route(None, path),), Choice(name, f"{PATH_VARIABLE}={name}")


def choose(packed: PackedWeight, variant: str) -> Choice:
    """The path of this weight with activations of `variant`, with its reason."""
    return plan(packed, variant)[1]


def prepare(packed: PackedWeight, variant: str, bias: Tensor | None = None, keep_stored: bool = True) -> Prepared:
    """Choose the paths of a validated weight and derive their layouts. `bias` fp32 (out,) overrides `packed.bias`.

    `keep_stored=False` lets go of the stored tensors where the layout can give them back (`Prepared.packed`).
    """
    bias = packed.bias if bias is None else bias
    routes, choice = plan(packed, variant)
    made: dict[str, Any] = {}
    for route in routes:
        if route.path.name not in made:
            made[route.path.name] = route.path.derive(packed, bias)
    ready = tuple(Route(r.up_to, r.path, made[r.path.name]) for r in routes)
    stored = packed if keep_stored or ready[0].path.restore is None else None
    return Prepared(packed.in_features, packed.out_features, packed.codes.device, choice, ready, bias, stored, packed.outlier_weight is not None)


def quantize(x: Tensor, factors: ActFactors, route: Route) -> Any:
    """Quantize `x (M, in)` for a route; linears of a site that take the same path may share the result."""
    return route.path.quantize(x, factors)


def check_input(x: Tensor, prepared: Prepared) -> None:
    """ValueError unless `x (..., in)` is a float tensor on the weight's device."""
    if x.dim() < 1 or x.shape[-1] != prepared.in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}; the layer takes {prepared.in_features} channels: (..., {prepared.in_features})")
    if x.device != prepared.device:
        raise ValueError(f"x is on {x.device}, the layer's weights on {prepared.device}")
    if not x.dtype.is_floating_point:
        raise ValueError(f"x is {x.dtype}; the layer takes a float type")


def linear(x: Tensor, prepared: Prepared, factors: ActFactors, tokens: Any = None) -> Tensor:
    """`x (..., in)` -> `(..., out)` in x's dtype, by the prepared path. `tokens`: the quantized `x`, when already at hand."""
    check_input(x, prepared)
    flat = x.reshape(-1, prepared.in_features)
    route = prepared.route(flat.shape[0])
    if prepared.has_outliers:
        return reference.linear(x, prepared.packed, factors, prepared.bias, route.weight)
    if factors.variant == "none":
        y = reference.unquantized(flat, route.weight).to(x.dtype)
    elif tokens is None and route.path.forward is not None:
        y = route.path.forward(flat, route.weight, factors)
    else:
        tokens = quantize(flat, factors, route) if tokens is None else tokens
        y = route.path.linear(tokens, route.weight, x.dtype)
    return y.reshape(*x.shape[:-1], prepared.out_features)


def accumulate(q: Tensor, prepared: Prepared) -> Tensor:
    """int32 sums `(M, out)` of codes `q int8 (M, in)` in 0..127, by the path that `linear` would take (the final check)."""
    if prepared.has_outliers:
        return reference.accumulate(q, prepared.packed)
    route = prepared.route(q.shape[0])
    return route.path.accumulate(q, route.weight)


def describe(device: str = "cpu") -> Choice:
    """What a usual packed layer would take on this machine's CPU, or GPU: for `doctor`."""
    from lbllm_kernels.format import to_device
    from lbllm_kernels.synthetic import random_packed

    return choose(to_device(random_packed(16, 64, 32, "codebook"), torch.device(device)), "piecewise")
