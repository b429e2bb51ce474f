"""A language small enough to learn in seconds and dense enough that forgetting hurts.

Random text teaches nothing about quantization: a model that only needs a bigram table keeps it in the embedding, which
is not quantized. This language is *second order*. With an alphabet of `K` symbols and three tables of permutations,

    x_t = pi_j[x_{t-1}](x_{t-2}),      j = 0, 1, 2 with probability 0.95, 0.04, 0.01,

so that (x_{t-2}, x_{t-1}) -> (x_{t-1}, x_t) is a bijection of the K^2 contexts: long cycles, a flat unigram distribution
(perplexity about K), and K^2 associations that only the blocks' weights can hold. A plain random table in place of the
permutations falls into short cycles, and a model that learnt forty contexts survives two-bit rounding unharmed (tried).
Now and then a mark announces that 8 to 23 symbols are copied from 16 to 63 places back: attention has work to do too.

The entropy floor is about 1.25 in perplexity (without copies), the unigram ceiling about 33.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ALPHABET = "abcdefghijklmnopqrstuvwxyz ,.;:!"
MARK = "="
SYMBOLS = ALPHABET + MARK
PROBABILITIES = (0.95, 0.04, 0.01)
COPY_RATE = 0.03
COPY_BACK = (16, 64)
COPY_SPAN = (8, 24)


class Language:
    """The language of one seed. Equal seeds give equal tables and, for equal streams, equal text."""

    def __init__(self, seed: int):
        self.seed = seed
        size = len(ALPHABET)
        generator = np.random.default_rng([seed, 1])
        tables = [[generator.permutation(size) for _ in range(size)] for _ in PROBABILITIES]
        after_mark = generator.integers(0, size, (size + 1, size + 1, len(PROBABILITIES)))
        after_mark[:size, :size] = np.asarray(tables).transpose(2, 1, 0)
        self.next: NDArray[np.int64] = after_mark

    def sample(self, rows: int, length: int, stream: int) -> NDArray[np.int64]:
        """Symbols `(rows, length)` in 0..K (K is the mark); `stream` separates training, calibration and evaluation text."""
        size = len(ALPHABET)
        generator = np.random.default_rng([self.seed, 2, stream])
        out = np.zeros((rows, length), np.int64)
        out[:, :2] = generator.integers(0, size, (rows, min(2, length)))
        branch = np.searchsorted(np.cumsum(PROBABILITIES[:-1]), generator.random((rows, length)))
        starts = generator.random((rows, length)) < COPY_RATE
        back, span = generator.integers(*COPY_BACK, (rows, length)), generator.integers(*COPY_SPAN, (rows, length))
        left, distance, every = np.zeros(rows, np.int64), np.zeros(rows, np.int64), np.arange(rows)
        for t in range(2, length):
            grown = self.next[out[:, t - 2], out[:, t - 1], branch[:, t]]
            copied = out[every, np.maximum(t - distance, 0)]
            begins = starts[:, t] & (left == 0) & (t >= COPY_BACK[1])
            out[:, t] = np.where(begins, size, np.where(left > 0, copied, grown))
            left = np.where(begins, span[:, t], np.maximum(left - 1, 0))
            distance = np.where(begins, back[:, t], distance)
        return out

    def text(self, rows: int, length: int, stream: int) -> str:
        """`rows * length` characters, the rows of `sample` one after the other."""
        letters = np.array(list(SYMBOLS))
        return "".join(letters[self.sample(rows, length, stream)].ravel().tolist())
