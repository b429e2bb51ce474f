"""A weight in training on a GPU: made from latent weight and levels, its gradient sent back to them, in as few passes over memory as it takes.

**Problem.** A step of a LLaMA-2-7B block on 4096 tokens is 5e12 operations, 7 ms of products at the rate that cuBLAS reaches, and 202
million latent weights, each read and written by what is *not* a product: fake quantization, gradients of levels, AdamW. Written
in plain tensor operations these take longer than the products; in a small block their launches do.

**Passes a weight** (bytes; nearest-level codes; a bitmap adds the same for itself):

    quantized_weight   latent 4, made weight 2                          once a step, whatever the number of micro-batches
    gradient_sums      gradient 2, latent 4                             sums a level of each group, and squares for the norm; gradient of learned levels
    adamw_             gradient 2, latent 8, two moments 16             the gradient of a made weight IS the latent weight's (straight-through)

38 bytes x 202 M = 7.7 GB, 3 ms at 2.5 TB/s. Gradients of weights stay in bf16, as the product wrote them; masters and moments are float32.

**Learned levels** come as they are stored, fractions of a row's largest in any order. The kernel that makes the weight sorts the four of a
group (six comparisons; equal ones as stored, NaN last: a stable sort), rounds them to the int8 grid and scales them; the one that sums
gradients sends each sum back to where its level is stored. As tensor operations that is a dozen small passes, and sorting four numbers a
group with `torch.sort` alone took a fifth of a step. Where they are entries of a table, `group_codes` says which; `entry_sums` gathers what the groups
of an entry give it, in a fixed order.

**Layout.** When G divides `in`, a weight `(out, in)` is a table `(out * n_groups, G)` and levels are `(out * n_groups, 4)`: every kernel
works on a tile of whole groups.

**Trade-off.** Only where G is a power of two that divides `in`; elsewhere plain tensor operations do it. Not bit-equal to those
(sums in another order): results on a GPU were never bit-reproducible between devices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbllm_kernels.triton_matmul import _rint

NEAREST, CODES, BITMAP = 0, 1, 2
TILE = 2048  # weights a program


def fits(columns: int, group_size: int) -> bool:
    """Whether a weight with so many input channels is a table of whole groups."""
    return columns % group_size == 0 and group_size & (group_size - 1) == 0 and 4 <= group_size <= 1024


@triton.jit
def _later(a, b):
    """1 where `a`, stored before `b`, comes after it in ascending order."""
    return (((a > b) | (a != a)) & (b == b)).to(tl.int32)


@triton.jit
def _ranks(a, b, c, d):
    """The place 0..3 of each of four numbers in ascending order; equal ones keep their order, NaN comes last."""
    ab, ac, ad, bc, bd, cd = _later(a, b), _later(a, c), _later(a, d), _later(b, c), _later(b, d), _later(c, d)
    return ab + ac + ad, 1 - ab + bc + bd, 2 - ac - bc + cd, 3 - ad - bd - cd


@triton.jit
def _pick(place, a, b, c, d):
    """`(a, b, c, d)[place]`, elementwise."""
    return tl.where(place < 2, tl.where(place == 0, a, b), tl.where(place == 2, c, d))


@triton.jit
def _ranked(k: tl.constexpr, ra, rb, rc, a, b, c, d):
    """The one of four numbers whose rank is k."""
    return tl.where(ra == k, a, tl.where(rb == k, b, tl.where(rc == k, c, d)))


@triton.jit
def _on_grid(level, scale):
    """A learned level, a fraction of 127, as a real number: to the int8 grid, times the row's scale. NaN stays NaN."""
    unit = level * 127.0
    return tl.where(unit == unit, tl.minimum(tl.maximum(_rint(unit), -127.0), 127.0), unit) * scale


@triton.jit
def _stored(levels, group, here):
    """Four numbers of each group, `(ROWS,)`."""
    a = tl.load(levels + group * 4, mask=here, other=0.0)
    b = tl.load(levels + group * 4 + 1, mask=here, other=0.0)
    c = tl.load(levels + group * 4 + 2, mask=here, other=0.0)
    d = tl.load(levels + group * 4 + 3, mask=here, other=0.0)
    return a, b, c, d


@triton.jit
def _entry(group_codes, group, here, TABLE: tl.constexpr):
    """Where the levels of each group are stored: at its place, or in the entry of the table that it picks."""
    if TABLE:  # noqa: SIM108  (a branch of the kernel, not a choice at run time)
        place = tl.load(group_codes + group, mask=here, other=0).to(tl.int64)
    else:
        place = group
    return place


@triton.jit
def _levels(levels, group, here):
    """Four real levels of each group, `(ROWS, 1)`."""
    a, b, c, d = _stored(levels, group, here)
    return a[:, None], b[:, None], c[:, None], d[:, None]


@triton.jit
def _code(source, bitmap, at, inside, a, b, c, d, MODE: tl.constexpr):
    """The code 0..3 of each weight; `2 s + b` where there is a bitmap."""
    if MODE == 1:
        code = tl.load(source + at, mask=inside, other=0).to(tl.int32)
    else:
        w = tl.load(source + at, mask=inside, other=0.0)
        low = (w > (a + b) * 0.5).to(tl.int32)
        high = 2 + (w > (c + d) * 0.5).to(tl.int32)
        if MODE == 0:
            code = tl.where(w > (b + c) * 0.5, high, low)
        else:
            code = tl.where(tl.load(bitmap + at, mask=inside, other=0.0) > 0.5, high, low)
    return code


@triton.jit
def _pair_difference(source, at, inside, a, b, c, d):
    """What the bitmap bit decides between: value under s = 1 minus value under s = 0."""
    w = tl.load(source + at, mask=inside, other=0.0)
    return tl.where(w > (c + d) * 0.5, d, c) - tl.where(w > (a + b) * 0.5, b, a)


@triton.jit
def _polarizing(bitmap_value, beta, weight):
    """Derivative of `weight * (1 - |2 G - 1|^beta)^2`; 0 at one half."""
    t = 2.0 * bitmap_value - 1.0
    size = tl.abs(t)
    power = tl.where(size > 0.0, tl.exp2((beta - 1.0) * tl.log2(tl.maximum(size, 1e-30))), 0.0)
    return tl.where(t < 0.0, 4.0, -4.0) * weight * beta * power * (1.0 - power * size)


@triton.jit
def _quantized_weight(
    source, bitmap, levels, scales, group_codes, scaled, out, groups, per_row,
    G: tl.constexpr, ROWS: tl.constexpr, MODE: tl.constexpr, LEARNED: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = group < groups
    at = group[:, None] * G + tl.arange(0, G)[None, :]
    inside = here[:, None] & (tl.arange(0, G)[None, :] < G)
    if LEARNED:
        scale = tl.load(scales + group // per_row, mask=here, other=0.0)
        a, b, c, d = _stored(levels, _entry(group_codes, group, here, TABLE), here)
        ra, rb, rc, _ = _ranks(a, b, c, d)
        first, second = _on_grid(_ranked(0, ra, rb, rc, a, b, c, d), scale), _on_grid(_ranked(1, ra, rb, rc, a, b, c, d), scale)
        third, fourth = _on_grid(_ranked(2, ra, rb, rc, a, b, c, d), scale), _on_grid(_ranked(3, ra, rb, rc, a, b, c, d), scale)
        tl.store(scaled + group * 4, first, mask=here)
        tl.store(scaled + group * 4 + 1, second, mask=here)
        tl.store(scaled + group * 4 + 2, third, mask=here)
        tl.store(scaled + group * 4 + 3, fourth, mask=here)
        a, b, c, d = first[:, None], second[:, None], third[:, None], fourth[:, None]
    else:
        a, b, c, d = _levels(levels, group, here)
    code = _code(source, bitmap, at, inside, a, b, c, d, MODE)
    tl.store(out + at, _pick(code, a, b, c, d).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_sums(
    grad, source, bitmap, levels, learned, scales, group_codes, to_levels, to_rows, squares, beta_at, weight, groups, per_row,
    G: tl.constexpr, ROWS: tl.constexpr, MODE: tl.constexpr, POLARIZE: tl.constexpr, LEARNED: tl.constexpr, TABLE: tl.constexpr, MOVING: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = group < groups
    at = group[:, None] * G + tl.arange(0, G)[None, :]
    inside = here[:, None] & (tl.arange(0, G)[None, :] < G)
    a, b, c, d = _levels(levels, group, here)
    code = _code(source, bitmap, at, inside, a, b, c, d, MODE)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    first, second = tl.sum(tl.where(code == 0, g, 0.0), axis=1), tl.sum(tl.where(code == 1, g, 0.0), axis=1)
    third, fourth = tl.sum(tl.where(code == 2, g, 0.0), axis=1), tl.sum(tl.where(code == 3, g, 0.0), axis=1)
    norm = tl.zeros_like(first)
    if MOVING > 0:
        norm += tl.sum(g * g, axis=1)
    if MOVING == 2:
        to_bitmap = g * _pair_difference(source, at, inside, a, b, c, d)
        if POLARIZE:
            to_bitmap += _polarizing(tl.load(bitmap + at, mask=inside, other=0.0), tl.load(beta_at), weight)
        norm += tl.sum(tl.where(inside, to_bitmap * to_bitmap, 0.0), axis=1)
    if LEARNED:
        low, high, upper, top = _stored(levels, group, here)
        tl.store(to_rows + group, first * low + second * high + third * upper + fourth * top, mask=here)
        scale = tl.load(scales + group // per_row, mask=here, other=0.0)
        e, f, h, i = _stored(learned, _entry(group_codes, group, here, TABLE), here)
        re, rf, rh, ri = _ranks(e, f, h, i)
        e, f = _pick(re, first, second, third, fourth) * scale * 127.0, _pick(rf, first, second, third, fourth) * scale * 127.0
        h, i = _pick(rh, first, second, third, fourth) * scale * 127.0, _pick(ri, first, second, third, fourth) * scale * 127.0
        norm += e * e + f * f + h * h + i * i
        first, second, third, fourth = e, f, h, i
    tl.store(to_levels + group * 4, first, mask=here)
    tl.store(to_levels + group * 4 + 1, second, mask=here)
    tl.store(to_levels + group * 4 + 2, third, mask=here)
    tl.store(to_levels + group * 4 + 3, fourth, mask=here)
    tl.store(squares + group, norm, mask=here)


@triton.jit
def _adam(value, first, second, g, rate, correction1, correction2, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr):
    first = BETA1 * first + (1.0 - BETA1) * g
    second = BETA2 * second + (1.0 - BETA2) * g * g
    return value - rate / correction1 * first / (tl.sqrt(second) / correction2 + EPS), first, second


@triton.jit
def _adamw(
    grad, latent, m, v, bitmap, m_bitmap, v_bitmap, levels, factor_at, beta_at, weight, rate, rate_bitmap, correction1, correction2, groups,
    G: tl.constexpr, ROWS: tl.constexpr, MODE: tl.constexpr, POLARIZE: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = group < groups
    at = group[:, None] * G + tl.arange(0, G)[None, :]
    inside = here[:, None] & (tl.arange(0, G)[None, :] < G)
    factor = tl.load(factor_at)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(latent + at, mask=inside, other=0.0)
    if MODE == 2:
        a, b, c, d = _levels(levels, group, here)
        to_bitmap = g * (tl.where(w > (c + d) * 0.5, d, c) - tl.where(w > (a + b) * 0.5, b, a))
        bits = tl.load(bitmap + at, mask=inside, other=0.0)
        if POLARIZE:
            to_bitmap += _polarizing(bits, tl.load(beta_at), weight)
        first, second = tl.load(m_bitmap + at, mask=inside, other=0.0), tl.load(v_bitmap + at, mask=inside, other=0.0)
        bits, first, second = _adam(bits, first, second, to_bitmap * factor, rate_bitmap, correction1, correction2, BETA1, BETA2, EPS)
        tl.store(bitmap + at, tl.minimum(tl.maximum(bits, 0.0), 1.0), mask=inside)
        tl.store(m_bitmap + at, first, mask=inside)
        tl.store(v_bitmap + at, second, mask=inside)
    first, second = tl.load(m + at, mask=inside, other=0.0), tl.load(v + at, mask=inside, other=0.0)
    w, first, second = _adam(w, first, second, g * factor, rate, correction1, correction2, BETA1, BETA2, EPS)
    tl.store(latent + at, w, mask=inside)
    tl.store(m + at, first, mask=inside)
    tl.store(v + at, second, mask=inside)


def _tiles(levels: Tensor, group_size: int) -> tuple[int, int, tuple[int]]:
    """Groups in all, groups a program, and the grid."""
    groups = levels.numel() // 4
    rows = max(1, TILE // group_size)
    return groups, rows, (triton.cdiv(groups, rows),)


def _mode(source: Tensor, bitmap: Tensor | None) -> int:
    return CODES if source.dtype == torch.uint8 else BITMAP if bitmap is not None else NEAREST


def quantized_weight(
    source: Tensor, bitmap: Tensor | None, levels: Tensor, group_size: int, dtype: torch.dtype, scale: Tensor | None = None, group_codes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The weight that is used, `(out, in)`, and its real levels, ascending, `(out, n_groups, 4)`.

    source `(out, in)` latent float32 or codes uint8, bitmap like it. levels `(out, n_groups, 4)`: real ones; with `scale (out,)` learned
    ones, fractions of 127 in any order, which are sorted, rounded to the int8 grid and scaled here; with `group_codes (out, n_groups)` uint8
    too, those of a table `(entries, 4)`.
    """
    made = torch.empty(source.shape, dtype=dtype, device=source.device)
    per_row = source.shape[1] // group_size
    scaled = levels if scale is None else torch.empty(source.shape[0], per_row, 4, device=source.device)
    groups, rows, grid = _tiles(scaled, group_size)
    _quantized_weight[grid](
        source, source if bitmap is None else bitmap, levels, levels if scale is None else scale, source if group_codes is None else group_codes,
        scaled, made, groups, per_row,
        G=group_size, ROWS=rows, MODE=_mode(source, bitmap), LEARNED=scale is not None, TABLE=group_codes is not None, enable_fp_fusion=False,
    )  # fmt: skip  # no fusion: a midpoint is a rounded sum
    return made, scaled


def gradient_sums(
    grad: Tensor, source: Tensor, bitmap: Tensor | None, levels: Tensor, group_size: int, squares: Tensor, moving: int = 1,
    learned: tuple[Tensor, Tensor] | None = None, beta: Tensor | None = None, weight: float = 0.0, group_codes: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """From the gradient of the used weight `(out, in)`: that of the levels, `(out, n_groups, 4)`, and that of the rows' gains `(out,)`.

    `levels`: real ones, as `quantized_weight` gave them. `learned`: levels as stored and the scale they were made with; the gradient is then
    theirs (with `group_codes`, what each group has for its entry of the table: `entry_sums` adds them up), and a gain is an exponent of the scale. Without, it is that of the real levels, and there is none of gains. `squares (groups,)`
    receives the squared norm of what each group's latent weights (`moving` 1), also bitmap (2), or neither (0), and learned levels get.
    """
    groups, rows, grid = _tiles(levels, group_size)
    to_levels = torch.empty_like(levels)
    to_rows = None if learned is None else torch.empty(levels.shape[:2], device=levels.device)
    stored, scale = (levels, levels) if learned is None else learned
    _gradient_sums[grid](
        grad, source, source if bitmap is None else bitmap, levels, stored, scale, source if group_codes is None else group_codes,
        to_levels, squares if to_rows is None else to_rows, squares, levels if beta is None else beta, weight, groups, groups // source.shape[0],
        G=group_size, ROWS=rows, MODE=_mode(source, bitmap), POLARIZE=beta is not None, LEARNED=learned is not None, TABLE=group_codes is not None, MOVING=moving,
    )  # fmt: skip
    return to_levels, None if to_rows is None else to_rows.sum(1)


@triton.jit
def _entry_sums(given, order, starts, out, BLOCK: tl.constexpr):
    entry = tl.program_id(0)
    first, last = tl.load(starts + entry), tl.load(starts + entry + 1)
    at = tl.arange(0, BLOCK)[:, None]
    four = tl.arange(0, 4)[None, :]
    total = tl.zeros((BLOCK, 4), tl.float32)
    for start in range(first, last, BLOCK):
        inside = start + at < last
        group = tl.load(order + start + at, mask=inside, other=0).to(tl.int64)
        total += tl.load(given + group * 4 + four, mask=inside & (four < 4), other=0.0)
    tl.store(out + entry * 4 + tl.arange(0, 4), tl.sum(total, 0))


def entry_sums(given: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """What each entry of a table gets from the groups that pick it, always in one order: given `(out, n_groups, 4)` -> `(entries, 4)`.

    order `(groups,)` int32: groups by entry; starts `(entries + 1,)` int32: where those of each entry begin.
    """
    made = torch.empty(len(starts) - 1, 4, device=given.device)
    _entry_sums[(len(starts) - 1,)](given, order, starts, made, BLOCK=128)
    return made


def adamw_(
    grad: Tensor, latent: Tensor, moments: tuple[Tensor, Tensor], levels: Tensor, group_size: int, factor: Tensor, rates: tuple[float, float], step: int,
    betas: tuple[float, float], eps: float, bitmap: Tensor | None = None, bitmap_moments: tuple[Tensor, Tensor] | None = None,
    beta: Tensor | None = None, weight: float = 0.0,
) -> None:  # fmt: skip
    """One AdamW step of a latent weight and its bitmap, in place. `levels`: those that the step computed with; `factor ()`: of gradient clipping; `step` from 1."""
    groups, rows, grid = _tiles(levels, group_size)
    m, v = moments
    m_bitmap, v_bitmap = bitmap_moments or moments
    _adamw[grid](
        grad, latent, m, v, latent if bitmap is None else bitmap, m_bitmap, v_bitmap, levels, factor, factor if beta is None else beta, weight, *rates,
        1.0 - betas[0] ** step, (1.0 - betas[1] ** step) ** 0.5, groups,
        G=group_size, ROWS=rows, MODE=NEAREST if bitmap is None else BITMAP, POLARIZE=beta is not None, BETA1=betas[0], BETA2=betas[1], EPS=eps,
    )  # fmt: skip
