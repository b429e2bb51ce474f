"""How many bits a weight really costs, item by item.

"2-bit" methods differ by what they leave out of the count. Here everything that a linear layer needs to be computed is counted:

    bits a weight = ( binary + bitmap                              1 + 1 bit a weight
                    + levels                                       32 bits a (row, group), explicit mode
                      or group codes + codebook                    8 bits a (row, group) + 32 bits an entry
                    + row scales                                   32 bits a row
                    + INT8 outlier channels, if any ) / weights    8 bits a weight of theirs, 32 bits a row, 32 a channel (perm)

so 2.25 for explicit levels at G = 128 or a codebook at G = 32, plus 32/in for the row scale. Controls are billed in their own
format, not in the container they run in: uniform INT2 with an fp16 scale and a 2-bit zero point a group, `residual` with two fp16 scales,
`affine8` with two int8 a group on the row scale. Activation factors (four numbers a site) and biases belong to the model, not to the weights; bytes on
disk count them, with embeddings, norms, head and tokenizer, as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

BILLS = ("lut8", "int2", "affine8", "residual")
BILL_OF_FAMILY = {"free": "lut8", "affine": "affine8", "int2": "int2", "residual": "residual"}  # explicit levels; a table is billed as `lut8` whatever its entries are

NF4_BLOCK = 64  # weights that share a scale


@dataclass(frozen=True)
class Bits:
    """Bits of some linears by item; `weights` is how many weights share them."""

    weights: int
    items: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.items.values())

    @property
    def effective_bpw(self) -> float:
        """Bits a weight, everything counted."""
        return self.total / self.weights

    def per_weight(self) -> dict[str, float]:
        """Each item in bits a weight; they add up to `effective_bpw`."""
        return {name: bits / self.weights for name, bits in self.items.items()}


def linear_bits(out: int, in_features: int, group_size: int, codebook_entries: int = 0, outliers: int = 0, bill: str = "lut8") -> Bits:
    """Bits of one linear `(out, in)`. `codebook_entries` 0: explicit levels. `bill` names the format that is charged."""
    if bill not in BILLS:
        raise ValueError(f"bill {bill!r} is unknown; choose one of {', '.join(BILLS)}")
    groups, weights = out * -(-in_features // group_size), out * in_features
    items = {"binary": weights, "bitmap": weights}
    if bill == "int2":
        items |= {"group_scales": 16 * groups, "group_zeros": 2 * groups}
    elif bill == "residual":
        items["group_scales"] = 32 * groups
    elif bill == "affine8":
        items["group_base_step"] = 16 * groups
    elif codebook_entries:
        items |= {"group_codes": 8 * groups, "codebook": 32 * codebook_entries}
    else:
        items["levels"] = 32 * groups
    if bill in ("lut8", "affine8"):
        items["row_scales"] = 32 * out
    if outliers:
        items["outliers"] = 8 * out * outliers + 32 * out + 32 * in_features
    return Bits(weights, items)


def library_bits(out: int, in_features: int, control: str) -> Bits:
    """Bits of one linear `(out, in)` of bitsandbytes: `nf4` with a float32 scale for 64 weights, counted through the rows, or `int8` with one a row."""
    weights = out * in_features
    if control == "nf4":
        return Bits(weights, {"codes": 4 * weights, "block_scales": 32 * -(-weights // NF4_BLOCK)})
    return Bits(weights, {"codes": 8 * weights, "row_scales": 32 * out})


def add(parts: Iterable[Bits]) -> Bits:
    """Sum over linears, item by item."""
    weights, items = 0, dict[str, int]()
    for part in parts:
        weights += part.weights
        for name, bits in part.items.items():
            items[name] = items.get(name, 0) + bits
    return Bits(weights, items)


def kv_bits_per_element(kv_bits: int, head_dim: int) -> float:
    """Bits of a cached key or value element: at 4 bits, an fp16 scale and an fp16 minimum a (token, head) come on top."""
    return float(kv_bits) if kv_bits >= 16 else kv_bits + 32 / head_dim
