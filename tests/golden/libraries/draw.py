"""Random numbers that look like trained codebooks and their latents."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Draw:
    """One family's numbers, the same in every run.

    Attributes:
        rows: tokens that are wanted, a multiple of 32.
    """

    def __init__(self, family: str, rows: int, *, full_size: bool) -> None:
        """Seed by the family's name.

        Args:
            family: its name.
            rows: tokens, a multiple of 32.
            full_size: make quantizers as large as the published ones, and not for a file of 100 KB.
        """
        self.rows = rows
        self._full_size = full_size
        self._generator = torch.Generator().manual_seed(zlib.crc32(family.encode()))

    def size(self, golden: T, full: T) -> T:
        """Return the one or the other size."""
        return full if self._full_size else golden

    def normal(self, *shape: int) -> Tensor:
        """Draw float32."""
        return torch.randn(*shape, generator=self._generator)

    def positive(self, *shape: int) -> Tensor:
        """Draw float32 from 0.2 to 5 or so."""
        return torch.exp(0.5 * self.normal(*shape))

    def codes(self, count: int, width: int, scale: float = 1.0) -> Tensor:
        """Draw a codebook (count, width).

        Norms vary; one code in sixteen is dead, still in the range [-1/K, 1/K] of its initialisation; the last one is
        a copy of the first, as k-means on repeated data leaves them.
        """
        codes = self.normal(count, width) * self.positive(count, 1) * scale
        dead = torch.arange(count) % 16 == 7
        codes[dead] = (torch.rand(int(dead.sum()), width, generator=self._generator) * 2 - 1) / count
        codes[-1] = codes[0]
        return codes

    def pick(self, codes: Tensor) -> Tensor:
        """Draw a code for every token: (rows, D)."""
        return codes[torch.randint(len(codes), (self.rows,), generator=self._generator)]

    def near(self, stages: Sequence[Tensor]) -> Tensor:
        """Draw latents (rows, D): a code of every stage and some noise.

        Every sixteenth lies midway between two codes of the first stage, as far as float32 can say so.
        """
        latents = 0.3 * stages[-1].std() * self.normal(self.rows, stages[0].shape[1])
        for codes in stages:
            latents += self.pick(codes)
        between = torch.arange(self.rows) % 16 == 3
        latents[between] = ((self.pick(stages[0]) + self.pick(stages[0])) / 2)[between]
        return latents

    def sequences(self, rows: Tensor) -> Tensor:
        """Arrange rows (rows, C) as (b, s, C)."""
        return rows.reshape(4, -1, rows.shape[1])

    def images(self, rows: Tensor) -> Tensor:
        """Arrange rows as (b, C, h, w)."""
        return rows.reshape(-1, 4, 4, rows.shape[1]).movedim(-1, 1).contiguous()

    def videos(self, rows: Tensor) -> Tensor:
        """Arrange rows as (b, C, t, h, w)."""
        return rows.reshape(-1, 2, 4, 4, rows.shape[1]).movedim(-1, 1).contiguous()


def by_parts(function: Callable[[Tensor], Tensor], batch: Tensor, *, tokens: int = 4096) -> Tensor:
    """Apply a function to a few items of a batch at a time: the libraries build a matrix of tokens by codes."""
    per_item = max(1, batch[0].numel() // max(1, batch.shape[1]))
    return torch.cat([function(part) for part in batch.split(max(1, tokens // per_item))])
