"""The interface of a search backend: a codebook prepared once, then rows to indices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor


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
