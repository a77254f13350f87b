"""The interface of a search backend: a codebook prepared once, then rows to indices.

Two helpers that backends share are here as well: `OnDemand` makes a searcher when it is first needed, and
`MergedSearcher` merges equal codes, so that exact ties between them cost nothing.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from vqserve_server.device import wait_for_stream
from vqserve_server.event_log import event

logger = logging.getLogger(__name__)

# Elements of codes that are hashed at once: a codebook may be gigabytes.
_HASHED_ELEMENTS = 1 << 18


class Objective(StrEnum):
    """The quantity by which the winning code is chosen."""

    L2 = "l2"
    """Least squared Euclidean distance |z - a_j|^2."""
    DOT = "dot"
    """Greatest score z . a_j + b_j."""


@dataclass
class SearchCounts:
    """Counts of rows by the precision that they needed; every search adds to them.

    Attributes:
        rows: all rows.
        rechecked: rows that the fast pass could not decide.
        arbitrated: rows that float64 could not decide either.
    """

    rows: int = 0
    rechecked: int = 0
    arbitrated: int = 0

    def add(self, *, rows: int = 0, rechecked: int = 0, arbitrated: int = 0) -> None:
        """Count rows."""
        self.rows += rows
        self.rechecked += rechecked
        self.arbitrated += arbitrated


class Searcher(ABC):
    """One codebook, prepared for one backend on one device; thread-safe."""

    backend: str
    """Name of the backend, one of `available(device)`."""

    @abstractmethod
    def search(self, rows: Tensor, counts: SearchCounts | None = None) -> Tensor:
        """Return the winning code of every row.

        This is the winner in exact arithmetic on the stored numbers, the lowest index among equals. It does not depend
        on the backend, the device or the other rows.

        Args:
            rows: (n, D) float32 or float64 on the codebook's device, finite. A row that is not finite gets an arbitrary
                index in [0, K).
            counts: counters to which this search adds, for measurements.

        Returns:
            (n,) int64 on the same device.
        """


class OnDemand:
    """Makes a searcher at the first call and returns the same one at every later call; thread-safe.

    It is the slower searcher to which a faster one leaves some rows: the first call logs why.
    """

    def __init__(self, make: Callable[[], Searcher], device: torch.device) -> None:
        """Store the factory of the searcher and the device of its codebook."""
        self._make = make
        self._device = device
        self._lock = threading.Lock()
        self._searcher: Searcher | None = None

    def __call__(self, reason: str = "rows that the faster search cannot decide") -> Searcher:
        """Return the searcher.

        Args:
            reason: what is left to this searcher.
        """
        with self._lock:
            if self._searcher is None:
                searcher = self._make()
                # Other threads use other CUDA streams: the searcher's tables must be complete before they read them.
                wait_for_stream(self._device)
                self._searcher = searcher
                logger.info(event("search_falls_back", to=searcher.backend, device=self._device, reason=reason))
            return self._searcher


class CountingSearcher(Searcher):
    """A searcher whose searches all add to the same counters."""

    def __init__(self, searcher: Searcher, counts: SearchCounts) -> None:
        """Store the searcher and the counters."""
        self._searcher = searcher
        self._counts = counts
        self.backend = searcher.backend

    def search(self, rows: Tensor, counts: SearchCounts | None = None) -> Tensor:
        """Return the winning code of every row; see `Searcher.search`."""
        return self._searcher.search(rows, self._counts)


class MergedSearcher(Searcher):
    """Searches the distinct codes and returns, for each, its lowest index in the codebook."""

    def __init__(self, distinct: Searcher, lowest_index: Tensor) -> None:
        """Store a searcher over U distinct codes, and the (U,) codebook index of the first copy of each."""
        self._distinct = distinct
        self._lowest_index = lowest_index
        self.backend = distinct.backend

    def search(self, rows: Tensor, counts: SearchCounts | None = None) -> Tensor:
        """Return the winning code of every row; see `Searcher.search`."""
        return self._lowest_index[self._distinct.search(rows, counts)]


def first_of_equals(codes: Tensor, bias: Tensor | None) -> Tensor | None:
    """Return the (U,) ascending indices of the codes that equal no earlier code, or None if all codes differ.

    With a bias, two codes are equal only if their biases are equal too. -0.0 equals 0.0.
    """
    # Equal codes have equal hashes: if all hashes differ, as in nearly every codebook, no codes are equal.
    width = codes.shape[1] + (bias is not None)
    generator = torch.Generator("cpu").manual_seed(0x5EED)
    weights = torch.randint(-(2**62), 2**62, (width,), generator=generator, device="cpu").to(codes.device)
    step = max(1, _HASHED_ELEMENTS // width)
    parts = [slice(start, start + step) for start in range(0, codes.shape[0], step)]
    hashes = torch.cat([_hashes(_bits(codes, bias, part), weights) for part in parts])
    if torch.unique(hashes).numel() == codes.shape[0]:
        return None
    bits = _bits(codes, bias, slice(None))
    _, group = torch.unique(bits, dim=0, return_inverse=True)
    positions = torch.arange(bits.shape[0], device=bits.device)
    first = torch.full_like(positions, bits.shape[0]).scatter_reduce_(0, group, positions, "amin")
    firsts = first[first < bits.shape[0]].sort().values
    return None if firsts.numel() == bits.shape[0] else firsts


def _bits(codes: Tensor, bias: Tensor | None, part: slice) -> Tensor:
    """Return codes (K, D), and biases behind them, as integers that are equal exactly where the numbers are."""
    rows = codes[part] if bias is None else torch.cat([codes[part], bias[part, None].to(codes.dtype)], dim=1)
    bits = rows.detach().contiguous().view(torch.int32 if rows.dtype == torch.float32 else torch.int64)
    # -0.0 equals 0.0.
    return torch.where(bits == torch.iinfo(bits.dtype).min, 0, bits)


def _hashes(bits: Tensor, weights: Tensor) -> Tensor:
    hashes = torch.zeros(bits.shape[0], dtype=torch.int64, device=bits.device)
    for column in range(bits.shape[1]):
        hashes += (bits[:, column].to(torch.int64) ^ weights[column]) * (2 * weights[column] + 1)
    return hashes
