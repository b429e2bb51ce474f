"""The packed model in memory: linears that hold 2-bit codes and run as one integer product, inside an ordinary transformers model.

**Problem.** Inference must use exactly the numbers of the packed format (`kernels/README.md`): int8 levels, fp32 row scales, 4-bit
activations with one scale and zero point a token. A decoder block keeps its shape; only its seven linears change class.

**Equation** of `PackedLinear`:  `y = (s * row_scale) * (q W8^T - z * rowsum) + bias`,  `(q, s, z) = quantize(x)`.

**Sites.** q, k and v read the same tensor, and so do gate and up: an `ActSite` quantizes it once. It remembers the result for the
very tensor object it saw (a weak reference and the version counter, so neither a recycled object nor an in-place change can be
mistaken for it) and forgets it as soon as every linear of the site has read it. A decode step's few tokens go further: the first reader
runs the products of all of them in one call, and the others find their outputs waiting. Half the calls, one quantization.

**Precision.** Row scales, biases and activation factors stay fp32 whatever `.half()` or `.to(bfloat16)` is applied to the model: they
are part of the format, not of the model's compute type.

**Shapes.** `x (..., in)` -> `(..., out)` in x's dtype. Inference only: a gradient through it is refused, not silently zero.
**Memory.** The C++ path has its own layout, from which the stored tensors can be made again bit by bit. So a prepared linear lets go of
`codes` and `levels` or `group_codes`; `state_dict`, a move to another device, or asking for the buffer brings them back.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from lbllm_kernels import cpu, dispatch, ops
from lbllm_kernels.activation import PACKED_VARIANTS, ActFactors, factors_of
from lbllm_kernels.format import FORMAT_VERSION, MAX_IN_FEATURES, FormatError, PackedWeight, count_groups, validate
from torch import Tensor, nn

from lbllm_core.errors import ArtifactError, ModelError
from lbllm_core.model.blocks import SITE_OF, SITES, Decoder, linears_of, linears_of_site
from lbllm_core.model.half import keep_half

QUANT_METHOD = "lbllm"
FLOAT_BUFFERS = ("row_scale", "bias", "factors", "outlier_scale")
GIVEN_UP = ("codes", "levels", "group_codes")  # buffers that a prepared C++ layout can give back
FUSED_LEVEL = {"cpu_avx2": cpu.AVX2}  # where a path is forced below what the processor has


@dataclass(frozen=True)
class PackedScheme:
    """What `quantization_config` in config.json says: all that decides shapes and arithmetic beside the tensors."""

    group_size: int
    level_mode: str  # "codebook" or "explicit"
    codebook_size: int  # entries of every table (codebook mode)
    act_bits: int
    act_variant: str  # "uniform", "piecewise", "planes" or "none"
    kv_bits: int
    scheme: str = "w1p1a4"
    weight_bits: int = 2
    level_type: str = "s8"
    format_version: int = FORMAT_VERSION
    outlier_channels: int = 0  # INT8 channels of every input

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with `quant_method`; `outlier_channels` only where there are some."""
        return {"quant_method": QUANT_METHOD, **{key: value for key, value in vars(self).items() if value or key != "outlier_channels"}}


def scheme_from_dict(values: dict[str, Any], where: str) -> PackedScheme:
    """Read and check a `quantization_config`. Raises ArtifactError naming `where`, the key and what is allowed."""
    version = values.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise ArtifactError(f"{where}: quantization_config.format_version={version!r} is not a version; this is not a packed lbllm model")
    if version > FORMAT_VERSION:
        raise ArtifactError(f"{where}: packed format version {version} is newer than {FORMAT_VERSION}, the newest this lbllm reads; upgrade lbllm")
    rules: dict[str, Callable[[Any], bool]] = {
        "group_size": lambda v: type(v) is int and v > 0 and v % 4 == 0,
        "level_mode": lambda v: v in ("codebook", "explicit"),
        "codebook_size": lambda v: type(v) is int and 0 <= v <= 256,
        "act_bits": lambda v: v in (4, 16),
        "act_variant": lambda v: v in (*PACKED_VARIANTS, "none"),
        "outlier_channels": lambda v: type(v) is int and 0 <= v <= MAX_IN_FEATURES,
        "kv_bits": lambda v: v in (4, 16),
        "weight_bits": lambda v: v == 2,
        "level_type": lambda v: v == "s8",
        "scheme": lambda v: isinstance(v, str),
    }
    values = {"outlier_channels": 0, **values}
    for key, rule in rules.items():
        if key not in values or not rule(values[key]):
            raise ArtifactError(f"{where}: quantization_config.{key}={values.get(key)!r} is not valid in packed format version {version}; the file is damaged")
    scheme = PackedScheme(format_version=version, **{key: values[key] for key in rules})
    if scheme.level_mode == "codebook" and scheme.codebook_size == 0:
        raise ArtifactError(f"{where}: quantization_config.codebook_size=0 does not go with level_mode=codebook; the file is damaged")
    return scheme


@dataclass
class _Memo:
    """What was computed from one tensor: its tokens for a path, or the outputs that wait for their readers (few tokens)."""

    source: weakref.ref[Tensor]
    version: int
    tokens: Any = None
    path: str = ""
    readers_left: int = 0
    outputs: dict[int, Tensor] = field(default_factory=dict)

    def is_of(self, x: Tensor) -> bool:
        return self.source() is x and self.version == x._version


class ActSite(nn.Module):
    """One input site of a block: its factors, fp32 = clip_max, clip_min and knee_low, knee_high or four plane weights, and the tokens in hand."""

    factors: Tensor

    def __init__(self, variant: str, readers: int, device: torch.device | str | None = None):
        super().__init__()
        self.variant, self.readers = variant, readers
        self.register_buffer("factors", torch.tensor(ActFactors(variant).numbers(), dtype=torch.float32, device=device))
        self.values: ActFactors | None = None
        self._members: list[weakref.ref[PackedLinear]] = []
        self._memo: _Memo | None = None
        self._all: tuple[list[int], cpu.Fused] | None = None

    def forget(self, tokens: bool = True) -> None:
        """Drop what was derived from the members' weights, and `tokens`, which are derived from the factors alone."""
        self._all = None
        if tokens or (self._memo is not None and self._memo.outputs):
            self._memo = None

    def join(self, reader: PackedLinear) -> None:
        """`reader` reads this site's input."""
        self._members = [m for m in self._members if m() is not None] + [weakref.ref(reader)]
        self.forget()

    def prepare(self) -> ActFactors:
        """Read the factors out of the buffer. Raises FormatError when they are not valid."""
        try:
            self.values = ActFactors("none") if self.variant == "none" else factors_of(self.variant, self.factors.tolist())
        except ValueError as error:
            raise FormatError(f"factors: {error}") from error
        self.forget()
        return self.values

    def tokens(self, x: Tensor, route: dispatch.Route) -> Any:
        """The quantized tokens of `x`, computed at its first reader and shared with the others."""
        values = self.values if self.values is not None else self.prepare()
        memo, path = self._memo, route.path.name
        tracked = not x.is_inference()  # an inference tensor has no version: a change in place could not be seen
        if tracked and memo is not None and memo.is_of(x) and memo.path == path:
            memo.readers_left -= 1
            if memo.readers_left <= 0:
                self._memo = None
            return memo.tokens
        tokens = dispatch.quantize(x.reshape(-1, x.shape[-1]), values, route)
        if tracked and self.readers > 1:
            self._memo = _Memo(weakref.ref(x), x._version, tokens, path, self.readers - 1)
        return tokens

    def few(self, x: Tensor, reader: PackedLinear, alone: cpu.Fused) -> Tensor:
        """Output of `reader` on few tokens that `alone`, its own call, takes; the first reader computes for all."""
        if self.readers == 1 or x.is_inference():
            return alone(x)[0]
        memo = self._memo
        if memo is not None and memo.is_of(x):
            waiting = memo.outputs.pop(id(reader), None)
            if waiting is not None:
                if not memo.outputs:
                    self._memo = None
                return waiting
        keys, fused = self._all if self._all is not None else self._prepare_all()
        outputs = dict(zip(keys, fused(x), strict=True))
        mine = outputs.pop(id(reader))
        self._memo = _Memo(weakref.ref(x), x._version, outputs=outputs) if outputs else None
        return mine

    def _prepare_all(self) -> tuple[list[int], cpu.Fused]:
        """One call for all members on the C++ path. Members are prepared first: that forgets what is derived here."""
        members = [m for m in (ref() for ref in self._members) if m is not None]
        ready = [(m, m.prepared.cpu_weight) for m in members]
        assert self.values is not None
        weights = [w for _, w in ready if w is not None]
        level = min(FUSED_LEVEL.get(m.prepared.choice.path, cpu.AVX512) for m, _ in ready)
        self._all = ([id(m) for m, w in ready if w is not None], cpu.Fused(weights, self.values, level))
        return self._all

    def _apply(self, fn: Any, recurse: bool = True) -> ActSite:
        self.values = None
        self.forget()
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        _apply_keeping_fp32(self, before)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memo": None, "_all": None, "_members": []}  # copies of the members join their copy


class PackedLinear(nn.Module):
    """A linear layer in W(1+1): buffers by the names of the format. Built empty; filled by loading, then `prepare`d."""

    codes: Tensor
    row_scale: Tensor
    levels: Tensor | None
    group_codes: Tensor | None
    codebook: Tensor | None
    bias: Tensor | None
    perm: Tensor | None
    outlier_weight: Tensor | None
    outlier_scale: Tensor | None

    def __init__(self, in_features: int, out_features: int, scheme: PackedScheme, site: ActSite, bias: bool = False, device: Any = None):
        super().__init__()
        self.in_features, self.out_features, self.group_size = in_features, out_features, scheme.group_size
        self._site = (site,)  # in a tuple: the site is a module of the block, not of each of its readers
        self._prepared: dispatch.Prepared | None = None
        self._fused: cpu.Fused | None = None
        self._given_up: tuple[str, ...] = ()
        groups = count_groups(in_features, scheme.group_size)

        def room(name: str, present: bool, dtype: torch.dtype, *shape: int) -> None:
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device) if present else None)

        self.coded = coded = scheme.level_mode == "codebook"
        room("codes", True, torch.uint8, out_features, -(-in_features // 4))
        room("row_scale", True, torch.float32, out_features)
        room("levels", not coded, torch.int32, out_features, groups)
        room("group_codes", coded, torch.uint8, out_features, groups)
        room("codebook", coded, torch.int32, scheme.codebook_size)
        room("bias", bias, torch.float32, out_features)
        outliers = scheme.outlier_channels
        room("perm", outliers > 0, torch.int32, in_features)
        room("outlier_weight", outliers > 0, torch.int8, out_features, outliers)
        room("outlier_scale", outliers > 0, torch.float32, out_features)
        site.join(self)

    @property
    def site(self) -> ActSite:
        return self._site[0]

    def packed(self) -> PackedWeight:
        """The tensors as a value of the format (copied only where they had been given up)."""
        if self._given_up:
            return self.prepared.packed
        return PackedWeight(
            self.codes, self.row_scale, self.in_features, self.group_size, self.levels, self.group_codes, self.codebook, self.bias, self.perm,
            self.outlier_weight, self.outlier_scale,
        )  # fmt: skip

    def prepare(self, name: str = "") -> dispatch.Prepared:
        """Check the tensors and derive the layouts of the paths that dispatch chooses.

        Raises FormatError (prefixed by `name`) for broken tensors, ModelError when LBLLM_KERNEL_PATH asks for what cannot be had.
        """
        self._take_back()
        values = self.site.values if self.site.values is not None else self.site.prepare()
        try:
            prepared = dispatch.prepare(validate(self.packed(), name), values.variant, keep_stored=False)
        except dispatch.PathError as error:
            raise ModelError(str(error)) from error
        self.site.forget(tokens=False)
        self._prepared = prepared
        weight = prepared.cpu_weight
        if weight is not None and values.variant in cpu.QUANTIZES:
            self._fused = cpu.Fused([weight], values, FUSED_LEVEL.get(prepared.choice.path, cpu.AVX512))
        else:
            self._fused = None
        if prepared.stored is None:
            self._given_up = tuple(n for n in GIVEN_UP if self._buffers.get(n) is not None)
            for given_up in self._given_up:
                del self._buffers[given_up]
        return prepared

    def _take_back(self) -> None:
        """Make the buffers again that were given up."""
        if not self._given_up:
            return
        packed = self.prepared.packed
        names, self._given_up = self._given_up, ()
        for name in names:
            self._buffers[name] = getattr(packed, name)

    def __getattr__(self, name: str) -> Any:
        if name in GIVEN_UP and name in self.__dict__.get("_given_up", ()):
            self._take_back()
            return self._buffers[name]
        return super().__getattr__(name)

    @property
    def prepared(self) -> dispatch.Prepared:
        """The prepared weight: what `forward` runs with."""
        return self._prepared if self._prepared is not None else self.prepare()

    def forward(self, x: Tensor) -> Tensor:
        """`x (..., in)` -> `(..., out)`, same dtype."""
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a packed linear is for inference only: call the model under torch.no_grad()")
        prepared = self._prepared if self._prepared is not None else self.prepare()
        site = self._site[0]
        if torch.compiler.is_compiling():
            values = site.values if site.values is not None else site.prepare()
            if values.variant == "none" or x.numel() == 0 or prepared.has_outliers:
                return dispatch.linear(x, prepared, values)
            return ops.linear(x, prepared, self.group_size, values)
        if self._fused is not None and self._fused.takes(x):
            return site.few(x, self, self._fused)
        dispatch.check_input(x, prepared)
        values = site.values if site.values is not None else site.prepare()
        count = x.numel() // self.in_features
        path = prepared.route(count).path
        alone = path.forward is not None and (site.readers == 1 or count <= path.alone_up_to)
        tokens = None if alone or values.variant == "none" or prepared.has_outliers else site.tokens(x, prepared.route(count))
        return dispatch.linear(x, prepared, values, tokens)

    def extra_repr(self) -> str:
        mode = "codebook" if self.coded else "explicit levels"
        return f"{self.in_features}, {self.out_features}, group_size={self.group_size}, {mode}, bias={self.bias is not None}"

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        self._forget()
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        _apply_keeping_fp32(self, before)
        return self

    def _forget(self) -> None:
        """Back to the stored tensors: what was derived from them is about to be wrong."""
        self._take_back()
        self._prepared = self._fused = None
        self.site.forget()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._given_up:
            packed = self.prepared.packed
            for name in self._given_up:
                destination[prefix + name] = getattr(packed, name)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        buffers = dict(self._buffers)
        if self._given_up:
            packed = self.prepared.packed
            buffers |= {name: getattr(packed, name) for name in self._given_up}
        return {**self.__dict__, "_buffers": buffers, "_prepared": None, "_fused": None, "_given_up": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.site.join(self)


def _apply_keeping_fp32(module: nn.Module, before: dict[str, Tensor | None]) -> None:
    """Undo a change of number type that `nn.Module._apply` made to fp32 buffers; a change of device stays."""
    for name in FLOAT_BUFFERS:
        old = before.get(name)
        new = module._buffers.get(name)
        if old is not None and new is not None and new.dtype != torch.float32:
            module._buffers[name] = old.to(new.device)


def install_packed_linears(model: nn.Module, scheme: PackedScheme) -> None:
    """Replace the seven linears of every block of a (usually meta-device) transformers model by empty packed ones, in place.

    Each block gets `act_sites`, one `ActSite` a site. Raises ModelError when the model is not built like Llama.
    """
    for block in Decoder(model).blocks:
        device = next(block.parameters()).device
        variant = scheme.act_variant if scheme.act_bits < 16 else "none"
        sites = {site: ActSite(variant, len(linears_of_site(site)), device) for site in SITES}
        for path, linear in linears_of(block).items():
            packed = PackedLinear(linear.in_features, linear.out_features, scheme, sites[SITE_OF[path]], linear.bias is not None, device)
            parent, _, leaf = path.rpartition(".")
            setattr(block.get_submodule(parent), leaf, packed)
        block.act_sites = nn.ModuleDict(sites)


def packed_linears(model: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """Every packed linear of a model with its name, in order."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            yield name, module


def finalize(model: nn.Module, where: str, keep_16_bits: bool = True) -> None:
    """After the tensors are in: `settle` all of it, keep embedding and head in 16 bits. Raises ArtifactError naming `where`."""
    settle(model, where)
    keep_half(model, keep_16_bits)


def settle(part: nn.Module, where: str, name: str = "") -> None:
    """Check each packed linear of a model, or of its part `name`, derive its layout, freeze the rest. Raises ArtifactError naming `where`."""
    inside = f"{name}." if name else ""
    try:
        for module in part.modules():
            if isinstance(module, ActSite):
                module.prepare()
        for path, linear in packed_linears(part):
            linear.prepare(inside + path)
        for path, parameter in part.named_parameters():
            if parameter.numel() and not all(math.isfinite(float(end)) for end in torch.aminmax(parameter.detach())):  # NaN spreads to both ends
                raise FormatError(f"{inside}{path}: holds NaN or infinity")
    except FormatError as error:
        raise ArtifactError(f"{where} breaks the packed format: {error}; the file is damaged, pack the model again") from error
    part.requires_grad_(False)
