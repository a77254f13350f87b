"""The interface of a search backend: a codebook prepared once, then rows to indices.

Two helpers that backends share are here as well: `OnDemand` makes a searcher when it is first needed, and
`MergedSearcher` merges equal codes, so that exact ties between them cost nothing.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from vqserve_server.device import wait_for_stream


class Objective(StrEnum):
    """What the winning code is best at."""

    L2 = "l2"
    """Least squared Euclidean distance |z - a_j|^2."""
    DOT = "dot"
    """Greatest score z . a_j + b_j."""


@dataclass
class SearchCounts:
    """How many rows went how far; a search adds to it.

    Attributes:
        rows: all of them.
        rechecked: rows that the fast pass left open.
        arbitrated: rows that float64 left open as well.
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
    """One codebook, prepared for one backend on one device; safe for use by many threads."""

    backend: str
    """The backend's name, one of `available(device)`."""

    @abstractmethod
    def search(self, rows: Tensor, counts: SearchCounts | None = None) -> Tensor:
        """Return the winning code of every row.

        The answer is the winner in exact arithmetic on the numbers as stored, the lowest index among equals: it does
        not depend on the backend, the device, or the other rows.

        Args:
            rows: (n, D) float32 or float64 on the codebook's device. Rows are finite; a row that is not gets some
                index in [0, K).
            counts: what to add to, for those who measure.

        Returns:
            (n,) int64 on the same device.
        """


class OnDemand:
    """Makes a searcher once, for whichever thread asks first, and gives it to all."""

    def __init__(self, make: Callable[[], Searcher], device: torch.device) -> None:
        """Take what makes the searcher, and the device that its codebook is on."""
        self._make = make
        self._device = device
        self._lock = threading.Lock()
        self._searcher: Searcher | None = None

    def __call__(self) -> Searcher:
        """Return the searcher."""
        with self._lock:
            if self._searcher is None:
                searcher = self._make()
                # Before other threads have its tables.
                wait_for_stream(self._device)
                self._searcher = searcher
            return self._searcher


class MergedSearcher(Searcher):
    """A searcher over distinct codes that answers with the lowest index of each."""

    def __init__(self, distinct: Searcher, lowest_index: Tensor) -> None:
        """Take a searcher over U distinct codes and the (U,) index in the codebook of the first of each."""
        self._distinct = distinct
        self._lowest_index = lowest_index
        self.backend = distinct.backend

    def search(self, rows: Tensor, counts: SearchCounts | None = None) -> Tensor:
        """Return the winning code of every row; see `Searcher.search`."""
        return self._lowest_index[self._distinct.search(rows, counts)]


def first_of_equals(codes: Tensor, bias: Tensor | None) -> Tensor | None:
    """Return the (U,) ascending indices of the codes that equal no earlier one; None if all differ.

    Under DOT two codes are equal when their biases are too. -0.0 equals 0.0.
    """
    columns = codes if bias is None else torch.cat([codes, bias[:, None].to(codes.dtype)], dim=1)
    bits = columns.detach().contiguous().view(torch.int32 if columns.dtype == torch.float32 else torch.int64)
    # -0.0 becomes 0.0, so that equal numbers have equal bits.
    bits = torch.where(bits == torch.iinfo(bits.dtype).min, 0, bits)
    # Equal codes have equal hashes, so a codebook whose hashes all differ (nearly every one) has no equal codes.
    generator = torch.Generator("cpu").manual_seed(0x5EED)
    weights = torch.randint(-(2**62), 2**62, (bits.shape[1],), generator=generator, device="cpu").to(bits.device)
    hashes = torch.zeros(bits.shape[0], dtype=torch.int64, device=bits.device)
    for column in range(bits.shape[1]):
        hashes += (bits[:, column].to(torch.int64) ^ weights[column]) * (2 * weights[column] + 1)
    if torch.unique(hashes).numel() == bits.shape[0]:
        return None
    _, group = torch.unique(bits, dim=0, return_inverse=True)
    positions = torch.arange(bits.shape[0], device=bits.device)
    first = torch.full_like(positions, bits.shape[0]).scatter_reduce_(0, group, positions, "amin")
    kept = first[first < bits.shape[0]].sort().values
    return None if kept.numel() == bits.shape[0] else kept
