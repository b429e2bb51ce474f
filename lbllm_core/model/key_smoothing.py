"""Foldable smoothing of keys: make the vectors flat that a 4-bit cache rounds, at no cost.

The cache keeps a minimum and a step for each (token, head) vector of keys, so the step is a fifteenth of the vector's range, and a few channels
that are large in every token set it for all. Attention reads keys only through scores `q . k`, which leaves room to change both.

**What may be changed.** Keys are stored after the rotary embedding, which turns channels i and i + head_dim / 2 as the two coordinates of a plane,
by an angle that depends on the position. Scaling that plane and turning it by a fixed angle can be swapped with this, so for each
such pair of a key head, with any lambda > 0 and theta,

    k' = R(theta) k / lambda        q' = R(theta) q lambda        q' . k' = q . k

and both fold into the rows (and biases) of k_proj and q_proj; the query heads of a key head share its pairs. Scaling alone is known as SmoothAttention
(QServe). Turning is what the rotary embedding also allows, and it does more: slow planes hardly turn within a window, so their keys lie
around a mean. One that lies along an axis can be shared by two channels, and means of either sign can be made to point the same way, which
for a code with a minimum halves the range.

**What is minimised.** Rounding errors of a token's channels are about independent, of variance range_t^2 / (12 * 15^2), so the expected squared error of scores is

    J = mean_t range_t^2 * sum_i lambda_i^2 |q_i|^2        range_t = max_c k'_tc - min_c k'_tc

with |q_i|^2 the mean square of a query's pair i. Its logarithm falls by Adam on `log lambda` and `theta` from a start between the two plain answers (no scale, and
every pair at one height). A head for which nothing is gained is left as it is. Nothing is added at inference: packed files, caches and kernels do not know of it.

Where a norm stands between projection and rotary embedding (q_norm and k_norm of Qwen3) nothing can be folded through it, and keys stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

QUERY, KEY = "self_attn.q_proj", "self_attn.k_proj"
TOKENS = 4096  # that a transform is fitted on
STEPS = 200
RATE = 0.03  # of Adam, falling to nothing; log lambda and radians a step
SMALLEST = 1e-5  # of a key's largest value and of a query's mean square: a pair that is never used has no scale

Average = Callable[[Sequence[Tensor]], None]


@dataclass(frozen=True)
class KeyTransform:
    """What happens to the pairs of channels (i, i + head_dim / 2): `scale` (lambda) and `angle` (theta, radians), `(key heads, head_dim / 2)` each."""

    scale: Tensor
    angle: Tensor


def alone(_: Sequence[Tensor]) -> None:
    """The average over one process."""


def foldable(attention: nn.Module) -> bool:
    """Whether keys are a linear function of the block's normalised input up to the rotary embedding, in pairs."""
    parts: Any = attention
    return all(getattr(parts, name, None) is None for name in ("q_norm", "k_norm")) and int(parts.head_dim) % 2 == 0


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding: heads `(..., tokens, heads, head_dim)`, angles `(..., tokens, head_dim)`."""
    low, high = heads.chunk(2, -1)
    return heads * cos[..., None, :] + torch.cat([-high, low], -1) * sin[..., None, :]


def turned(x: Tensor, scale: Tensor, angle: Tensor) -> Tensor:
    """Each pair scaled and turned: x `(..., heads, head_dim)`, scale and angle `(heads, head_dim / 2)`."""
    low, high = x.chunk(2, -1)
    along, across = scale * angle.cos(), scale * angle.sin()
    return torch.cat([along * low - across * high, across * low + along * high], -1)


def query_energy(queries: Tensor, key_heads: int) -> Tensor:
    """Mean square of each pair of the queries `(tokens, query heads, head_dim)`, over the query heads of a key head: `(key heads, head_dim / 2)`. The rotary embedding keeps it."""
    low, high = queries.float().square().mean(0).reshape(key_heads, -1, queries.shape[-1]).mean(1).chunk(2, -1)
    return low + high


def score_error(keys: Tensor, energy: Tensor, transform: KeyTransform) -> Tensor:
    """`log J` of each key head `(key heads,)`. keys `(tokens, key heads, head_dim)` behind the rotary embedding, energy `(key heads, head_dim / 2)`."""
    made = turned(keys, 1 / transform.scale, transform.angle)
    widths = made.amax(-1) - made.amin(-1)
    return widths.square().mean(0).clamp_min(1e-30).log() + (energy * transform.scale.square()).sum(-1).log()


def fit(keys: Tensor, energy: Tensor, average: Average = alone, steps: int = STEPS) -> tuple[KeyTransform, Tensor]:
    """The transform of a block's keys, scales of geometric mean 1 in a head; and the share of the expected squared error of scores that is left, `(key heads,)`.

    keys `(tokens, key heads, head_dim)` float32, behind the rotary embedding; energy as `query_energy` makes it. `average` takes means over processes
    in place where each has tokens of its own; all then find the same transform.
    """
    energy = energy.clamp_min(SMALLEST)
    low, high = keys.abs().amax(0).clamp_min(SMALLEST).chunk(2, -1)
    peaks = torch.maximum(low, high).log()
    average([energy, peaks])
    none = KeyTransform(torch.ones_like(peaks), torch.zeros_like(peaks))
    before = score_error(keys, energy, none)
    with torch.enable_grad():
        scale, angle = (0.5 * peaks).requires_grad_(), torch.zeros_like(peaks).requires_grad_()
        optimizer = torch.optim.Adam([scale, angle], RATE)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
            gradients = torch.autograd.grad(score_error(keys, energy, KeyTransform(scale.exp(), angle)).sum(), [scale, angle])
            average(gradients)
            scale.grad, angle.grad = gradients
            optimizer.step()
    scale, angle = scale.detach(), angle.detach()
    made = KeyTransform((scale - scale.mean(-1, keepdim=True)).exp(), angle)
    gain = score_error(keys, energy, made) - before
    average([gain])
    better = (gain < 0)[:, None]
    return KeyTransform(torch.where(better, made.scale, none.scale), torch.where(better, made.angle, none.angle)), gain.clamp_max(0).exp()


def fold(weights: dict[str, Tensor], biases: dict[str, Tensor], transform: KeyTransform) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A block's weights `(out, in)` and biases with the transform in k_proj and its inverse in q_proj. Inputs are not modified."""
    weights, biases = dict(weights), dict(biases)
    heads, pairs = transform.scale.shape
    repeats = weights[QUERY].shape[0] // (heads * 2 * pairs)
    shared = KeyTransform(*(t.repeat_interleave(repeats, 0) for t in (transform.scale, transform.angle)))
    for path, scale, angle in ((KEY, 1 / transform.scale, transform.angle), (QUERY, shared.scale, shared.angle)):
        weights[path] = _rows(weights[path].T, scale, angle).T.contiguous()
        if path in biases:
            biases[path] = _rows(biases[path], scale, angle)
    return weights, biases


def _rows(x: Tensor, scale: Tensor, angle: Tensor) -> Tensor:
    """`turned` where the heads' channels `(..., heads * head_dim)` are in one row."""
    return turned(x.reshape(*x.shape[:-1], scale.shape[0], -1), scale, angle).flatten(-2)
