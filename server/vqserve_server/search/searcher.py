"""The interface of a search backend: a codebook prepared once, then rows to indices.

The arrays are numpy's or torch's: the compiled search takes numpy, all others tensors. torch is not imported here.

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
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from vqserve_server.device import wait_for_stream
from vqserve_server.event_log import event

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from torch import Tensor

    from vqserve_server.device import AnyDevice
    from vqserve_server.search.native import NativeSearcher

# numpy's or torch's.
ArrayT = TypeVar("ArrayT")


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


class RowSearcher(ABC, Generic[ArrayT]):
    """One codebook, prepared for one backend on one device; thread-safe."""

    backend: str
    """Name of the backend, one of `available(device)`."""

    @abstractmethod
    def search(self, rows: ArrayT, counts: SearchCounts | None = None) -> ArrayT:
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

    def compiled(self) -> Compiled | None:
        """Return the compiled search that this is, or is made of; None: it is another."""
        return None


class Compiled(NamedTuple):
    """A compiled search, and what becomes of its winners.

    Attributes:
        searcher: the search.
        lowest_index: (U,) int64, the index of each of its winners; None: the winner itself.
        counts: what its searches add to; None: they are not counted.
    """

    searcher: NativeSearcher
    lowest_index: npt.NDArray[np.int64] | None = None
    counts: SearchCounts | None = None


Searcher: TypeAlias = RowSearcher["Tensor"]
"""Of tensors."""


class OnDemand:
    """Makes a searcher at the first call and returns the same one at every later call; thread-safe.

    It is the slower searcher to which a faster one leaves some rows: the first call logs why.
    """

    def __init__(self, make: Callable[[], Searcher], device: AnyDevice) -> None:
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


class CountingSearcher(RowSearcher[ArrayT]):
    """A searcher whose searches all add to the same counters."""

    def __init__(self, searcher: RowSearcher[ArrayT], counts: SearchCounts) -> None:
        """Store the searcher and the counters."""
        self._searcher = searcher
        self._counts = counts
        self.backend = searcher.backend

    def search(self, rows: ArrayT, counts: SearchCounts | None = None) -> ArrayT:
        """Return the winning code of every row; see `RowSearcher.search`."""
        return self._searcher.search(rows, self._counts)

    def compiled(self) -> Compiled | None:
        """Return the compiled search, counted."""
        found = self._searcher.compiled()
        return None if found is None else found._replace(counts=self._counts)


class MergedSearcher(RowSearcher[ArrayT]):
    """Searches the distinct codes and returns, for each, its lowest index in the codebook.

    Attributes:
        distinct: searches them.
        lowest_index: (U,) of each.
    """

    def __init__(self, distinct: RowSearcher[ArrayT], lowest_index: ArrayT) -> None:
        """Store a searcher over U distinct codes, and the (U,) codebook index of the first copy of each."""
        self.distinct = distinct
        self.lowest_index: Any = lowest_index
        self.backend = distinct.backend

    def search(self, rows: ArrayT, counts: SearchCounts | None = None) -> ArrayT:
        """Return the winning code of every row; see `RowSearcher.search`."""
        winners: ArrayT = self.lowest_index[self.distinct.search(rows, counts)]
        return winners

    def compiled(self) -> Compiled | None:
        """Return the compiled search of the distinct codes."""
        found = self.distinct.compiled()
        return None if found is None else found._replace(lowest_index=np.asarray(self.lowest_index))
