"""Which codes tokens have, and how evenly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

# Up to so many codes there is a counter for each; a grid of values can have 2^32, of which tokens meet few.
_MOST_COUNTERS = 1 << 22
_MOST_PENDING = 1 << 20


@dataclass(frozen=True, kw_only=True)
class UsageBin:
    """How many codes have from `least` to `most` tokens each."""

    least: int
    most: int
    codes: int


@dataclass(frozen=True, kw_only=True)
class Usage:
    """How the tokens are spread over the codes.

    Attributes:
        codes: that a token can have.
        used: codes that at least one token has.
        dead: the others.
        bits: entropy of the codes' shares: what a token tells, log2 of the codes at most.
        perplexity: 2^bits, of how many evenly used codes that is.
        share: perplexity / codes.
        largest_share: of the tokens, those of the most used code.
        histogram: codes by their number of tokens: 0, 1, 2 to 3, 4 to 7 and so on, up to the most used code's.
    """

    codes: int
    used: int
    dead: int
    bits: float
    perplexity: float
    share: float
    largest_share: float
    histogram: tuple[UsageBin, ...]

    @classmethod
    def of(cls, counts: Ints, num_codes: int) -> Usage:
        """Return the figures of the counts of all used codes, of which there is at least one."""
        shares = counts / counts.sum()
        # One code that has all tokens would have -0.
        bits = float(abs((shares * np.log2(shares)).sum()))
        exponents = np.bincount(np.frexp(counts)[1] - 1)
        dead = num_codes - counts.size
        powers = (UsageBin(least=1 << k, most=(2 << k) - 1, codes=int(n)) for k, n in enumerate(exponents))
        return cls(
            codes=num_codes,
            used=counts.size,
            dead=dead,
            bits=bits,
            perplexity=2.0**bits,
            share=2.0**bits / num_codes,
            largest_share=float(shares.max()),
            histogram=(UsageBin(least=0, most=0, codes=dead), *powers),
        )


class UsageTally:
    """Counts tokens by code."""

    def __init__(self, num_ids: int) -> None:
        """Take the exclusive bound of the ids."""
        self._dense = np.zeros(num_ids, np.int64) if num_ids <= _MOST_COUNTERS else None
        self._ids = self._counts = np.empty(0, np.int64)
        self._pending: list[Ints] = []

    def add(self, ids: Ints) -> None:
        """Count the tokens (n,) of these codes."""
        if self._dense is not None:
            np.add.at(self._dense, ids, 1)
            return
        self._pending.append(ids)
        # As many as there are already: each is sorted a few times at most.
        if sum(map(len, self._pending)) >= max(_MOST_PENDING, self._ids.size):
            self._merge()

    def counts(self) -> Ints:
        """Return the numbers of tokens of the codes that have any, in the order of their ids."""
        if self._dense is not None:
            return self._dense[self._dense > 0]
        self._merge()
        return self._counts

    def _merge(self) -> None:
        new, counts = np.unique(np.concatenate([np.empty(0, np.int64), *self._pending]), return_counts=True)
        self._ids, place = np.unique(np.concatenate([self._ids, new]), return_inverse=True)
        total = np.zeros(self._ids.size, np.int64)
        np.add.at(total, place, np.concatenate([self._counts, counts]))
        self._counts = total
        self._pending = []
