"""What latents are to the tools, wherever they come from: rows, one for each token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class DataSetSize:
    """Sizes of a data set.

    Attributes:
        files: number of files.
        items: number of arrays that are used.
        bad_items: number of arrays that are left out because they cannot be used.
        tokens: number of rows of the used arrays.
        is_sampled: whether the latents are a sample of these rows; otherwise they are all of them.
    """

    files: int
    items: int
    bad_items: int
    tokens: int
    is_sampled: bool

    @property
    def text(self) -> str:
        """How many items and files: "307 items (4 left out) of 301 files"."""
        bad = f" ({self.bad_items} left out)" if self.bad_items else ""
        return f"{counted(self.items, 'item')}{bad} of {counted(self.files, 'file')}"


@dataclass(frozen=True, kw_only=True)
class Description:
    """What latents are, for a report.

    Attributes:
        shape: shape of the array; None: the latents are of a data set.
        dtype: element type, "float32"; of a data set all of them, "float16, float32".
        layout: layout, "channels_first"; of a data set all of them, "channels_first, channels_last".
        tokens: number of rows.
        data_set: sizes of the data set; None: the latents are one array.
    """

    shape: tuple[int, ...] | None
    dtype: str
    layout: str
    tokens: int
    data_set: DataSetSize | None = None


class LatentRows(Protocol):
    """Latents as rows, read in order."""

    @property
    def dim(self) -> int:
        """Number of channels, which is the width of a row."""

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

    def groupings(self) -> Iterator[tuple[str, Ints]]:
        """Yield ways to group rows that belong together, such as those of one picture, the largest groups first.

        Yields:
            What the groups are, in plural, and the number of each row's group, (n,).
        """


def counted(count: int, noun: str) -> str:
    """Return a count of things: "1 item", "2 items"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


class Subset:
    """Some of the rows of latents."""

    def __init__(self, rows: RandomRows, positions: Ints) -> None:
        """Store the rows and which of them, ascending."""
        self._rows = rows
        self._positions = positions
        self.dim = rows.dim

    def __len__(self) -> int:
        return len(self._positions)

    def take(self, positions: Ints) -> Rows:
        """Return the rows at these positions of the subset."""
        return self._rows.take(self._positions[positions])

    def chunks(self, rows_per_chunk: int) -> Iterator[Rows]:
        """Yield all rows in order, at most `rows_per_chunk` at a time."""
        for start in range(0, len(self), rows_per_chunk):
            yield self._rows.take(self._positions[start : start + rows_per_chunk])

    def check_channels(self, channels: int) -> None:
        """See LatentRows."""
        self._rows.check_channels(channels)

    def check_finite(self) -> None:
        """Check all rows, those that are not in the subset, too."""
        self._rows.check_finite()

    def placed(self, start: int) -> AbstractContextManager[None]:
        """See LatentRows."""
        return self._rows.placed(int(self._positions[start]) if len(self) else 0)

    def describe(self) -> Description:
        """See LatentRows."""
        return replace(self._rows.describe(), tokens=len(self))

    def groupings(self) -> Iterator[tuple[str, Ints]]:
        """See RandomRows."""
        for name, groups in self._rows.groupings():
            yield name, groups[self._positions]
