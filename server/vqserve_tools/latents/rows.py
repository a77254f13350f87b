"""What latents are to the tools, wherever they come from: rows, one for each token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Description:
    """What latents are, for a report.

    Attributes:
        shape: shape of the array.
        dtype: element type of the array.
        layout: layout of the array.
        tokens: number of rows.
    """

    shape: tuple[int, ...]
    dtype: str
    layout: str
    tokens: int


class LatentRows(Protocol):
    """Latents as rows, read in order."""

    @property
    def dim(self) -> int:
        """Number of channels, which is the width of a row."""

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the latents without the channels."""

    def __len__(self) -> int: ...

    def chunks(self, rows_per_chunk: int) -> Iterator[Rows]:
        """Yield all rows in order, at most `rows_per_chunk` at a time, (n, dim) float32 or float64.

        Raises:
            OSError: a file cannot be read any more.
        """

    def check_channels(self, channels: int) -> None:
        """Check the number of channels.

        Raises:
            InvalidShape: it is another.
        """

    def check_finite(self) -> None:
        """Check that all numbers are finite, also when converted to the type of the rows.

        Raises:
            NonFiniteLatents: names the first other one's position.
        """

    def placed(self, start: int) -> AbstractContextManager[None]:
        """Return a context that converts errors about rows to errors about tokens at their positions.

        Args:
            start: number of the first row of the chunk that `chunks` yielded last, which the errors are about.
        """

    def describe(self) -> Description:
        """Return what the latents are."""


class RandomRows(LatentRows, Protocol):
    """Rows that are read in any order, many times."""

    def take(self, positions: Ints) -> Rows:
        """Return the rows at these positions, (n, dim) in C order.

        Raises:
            OSError: a file cannot be read any more.
        """
