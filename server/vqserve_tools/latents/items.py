"""One item of a data set: how it is checked, how it is read part by part, and where its rows are from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import numpy as np

from vqserve.errors import VqserveError
from vqserve.layout import Layout
from vqserve_data.items import Cut, SourceArray
from vqserve_tools.latents.array import check_finite_as
from vqserve_tools.latents.rows import Ints, Rows

# Arrays are read in parts of up to this size.
_PART_BYTES = 1 << 25


class Form(NamedTuple):
    """What follows from an item's shape and dtype.

    Attributes:
        layout: layout of the array with its batch axis.
        axis: its channel axis.
        grid: shape of its tokens.
        tokens: number of its tokens.
        dtype: type of its rows, float32 or float64.
        stored: name of the type of its elements.
        is_one_part: whether it is read at once.
    """

    layout: Layout
    axis: int
    grid: tuple[int, ...]
    tokens: int
    dtype: np.dtype[Any]
    stored: str
    is_one_part: bool


class Piece(NamedTuple):
    """Neighbouring rows of one item.

    Attributes:
        rows: (n, dim) float32 or float64.
        first: number of the first row in its item.
        item: number of the item among those that are used.
        key: key of the item.
        source: file of the item.
        grid: shape of the item's tokens.
        rows_per_entry: number of rows of an entry of the batch axis; of an item without one, all of its rows.
    """

    rows: Rows
    first: int
    item: int
    key: str
    source: str
    grid: tuple[int, ...]
    rows_per_entry: int

    @contextmanager
    def named(self, row: int) -> Iterator[None]:
        """Convert errors about a row that the block raises to errors about the token of the item.

        Args:
            row: number of the item's row that the errors are about.
        """
        try:
            yield
        except VqserveError as error:
            placed = error.with_fields(row=row).placed(self.grid)
            raise placed.with_fields(path=item_name(self.key, self.source)) from None


class Chunk:
    """Rows of one or more items.

    Attributes:
        rows: (n, dim) float32 or float64.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        """Join pieces of one dtype."""
        self.rows: Rows = pieces[0].rows if len(pieces) == 1 else np.concatenate([piece.rows for piece in pieces])
        self._pieces = pieces
        self._lengths = np.array([len(piece.rows) for piece in pieces])
        self._starts = np.cumsum(self._lengths) - self._lengths

    def origins(self) -> Ints:
        """Return where each row comes from, (n, 3): its item, its entry of the batch axis there, its row there."""
        numbers = np.array([(piece.item, piece.rows_per_entry, piece.first) for piece in self._pieces], np.int64)
        items, rows_per_entry, firsts = np.repeat(numbers, self._lengths, axis=0).T
        rows = np.arange(len(self.rows)) - np.repeat(self._starts, self._lengths) + firsts
        return np.stack([items, rows // rows_per_entry, rows], axis=1)

    def placed(self, start: int) -> AbstractContextManager[None]:
        """Convert errors about rows, counted from row `start` of the chunk, to errors about tokens of items."""
        return row_named(self._named, start)

    def _named(self, row: int) -> AbstractContextManager[None]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        piece = self._pieces[number]
        return piece.named(row - int(self._starts[number]) + piece.first)


@contextmanager
def row_named(named: Callable[[int], AbstractContextManager[None]], start: int) -> Iterator[None]:
    """Convert errors about rows that the block raises, by what `named` returns for the row, counted from `start`."""
    try:
        yield
    except VqserveError as error:
        if error.row is None:
            raise
        with named(start + error.row):
            raise


def item_name(key: str, source: str) -> str:
    """Return what an item is called in a text."""
    return f"{source}, item {key}"


def checked(array: SourceArray, form: Form) -> Rows | None:
    """Check that all numbers of an item are finite; return the array if it is one part.

    Raises:
        NonFiniteLatents: names the first other one's position.
        FileError, OSError: it cannot be read.
    """
    if form.is_one_part:
        # There may be millions of small arrays.
        whole = array if isinstance(array, np.ndarray) else array[(slice(None),) * len(array.shape)]
        check_finite_as(whole, form.dtype, (0,) * whole.ndim)
        return whole
    for cut in _cuts(array.shape, form.axis, array.dtype.itemsize):
        check_finite_as(array[cut], form.dtype, [each.start for each in cut])
    return None


def parts(array: SourceArray, form: Form) -> Iterator[Rows]:
    """Yield an item part by part, in the order of its tokens; raises as `checked`."""
    for cut in _cuts(array.shape, form.axis, array.dtype.itemsize):
        yield array[cut]


def _cuts(shape: tuple[int, ...], axis: int, itemsize: int) -> Iterator[Cut]:
    """Yield parts of an array that together are all of it, with all channels, in the order of the tokens.

    Args:
        shape: shape of the array.
        axis: its channel axis.
        itemsize: bytes of an element.
    """
    grid = [each for each in range(len(shape)) if each != axis]
    inner = itemsize * math.prod(shape)
    outer: list[int] = []
    # The first axis of which one item, or more, are a part that is small enough.
    for along in grid:
        inner //= shape[along]
        if inner <= _PART_BYTES:
            break
        outer.append(along)
    else:
        along = outer.pop() if outer else axis
    step = max(1, _PART_BYTES // inner) if along != axis else shape[axis]
    for place in np.ndindex(*(shape[each] for each in outer)):
        cut = [slice(0, length) for length in shape]
        for each, at in zip(outer, place, strict=True):
            cut[each] = slice(at, at + 1)
        for start in range(0, shape[along], step):
            cut[along] = slice(start, min(start + step, shape[along]))
            yield tuple(cut)


def is_one_part(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    """Return whether an array is read at once."""
    return dtype.itemsize * math.prod(shape) <= _PART_BYTES
