"""Requests of a batch, encoded or decoded where they are: one call into the compiled library each.

The call reads the arrays of the requests, in any layout and of any type, computes, and writes into those of the
replies, without the interpreter's lock.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vqserve.dtypes import INDICES, LATENTS
from vqserve.layout import Layout
from vqserve_server.search.searcher import Compiled
from vqserve_server.search.threads import search_threads

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]

# Numbers of parts.h, by the storage in this machine's byte order.
_LATENTS = {dtype.storage: dtype.number for dtype in LATENTS if dtype.storage.isnative}
_INDICES = {dtype.storage: dtype.number for dtype in INDICES if dtype.storage.isnative}
_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
# A Part of parts.h: what all requests of one form share, and the rest.
_FORM, _PLACE = struct.Struct("6q"), struct.Struct("2Pqqq")
_FourCounts = ctypes.c_int64 * 4


class Span(NamedTuple):
    """Tokens of a request: the numbers [start, stop) of its grid, in C order.

    Attributes:
        latents: (b, C, ...) or (..., C), of a type's `storage` (vqserve.dtypes).
        indices: as many as there are tokens.
        layout: of the latents.
        start: the first token.
        stop: the token after the last.
    """

    latents: Array
    indices: Array
    layout: Layout
    start: int
    stop: int


class NativeBatch:
    """One codebook without projections; thread-safe."""

    def __init__(
        self, compiled: Compiled, names: Ints | None, rows_of: Callable[[str, np.dtype[Any]], Array | None]
    ) -> None:
        """Prepare a codebook.

        Args:
            compiled: finds the winners, and says what all searches add to.
            names: the index that is reported for each winner, not negative; None: the winner itself.
            rows_of: returns the rows (n, width) that indices stand for, in C order, by the output's name and the type
                (its `storage`) that they are wanted in; of that type, or of another one if it cannot hold them all.
        """
        self._book, self._library = compiled.searcher.book, compiled.searcher.library
        self._names = None if names is None else np.ascontiguousarray(names, np.int64)
        self._rows_of = rows_of
        self._counts = compiled.counts

    def encode(self, spans: Sequence[Span], *, is_wide: bool) -> bool | None:
        """Write the indices of all tokens, exactly as the searcher finds them.

        Args:
            spans: of the tokens; the latents are float64, or none is.
            is_wide: whether they are float64.

        Returns:
            Whether all latents are finite: a token that is not has an arbitrary index. None: some tokens must be
            searched by other means, and their indices have no meaning.

        Raises:
            MemoryError: there is too little memory.
        """
        described = _described(spans)
        if described is None:
            return None
        parts, rows = described
        counts = _FourCounts()
        if self._library.encode(
            ctypes.addressof(self._book.struct),
            parts,
            len(spans),
            rows,
            is_wide,
            None if self._names is None else self._names.ctypes.data,
            search_threads(),
            ctypes.addressof(counts),
        ):
            raise MemoryError("no memory for a search")
        rechecked, expanded, undecided, not_finite = counts
        if undecided:
            return None
        if self._counts is not None:
            self._counts.add(rows=rows, rechecked=rechecked, arbitrated=expanded)
        return not not_finite

    def decode(self, spans: Sequence[Span], *, output: str, dtype: np.dtype[Any]) -> bool | None:
        """Write the rows of all indices, each value rounded once.

        Args:
            spans: of the tokens.
            output: "latents" or "code_rows".
            dtype: of the latents.

        Returns:
            Whether all indices are in range: the row of one that is not has no meaning. None: the rows must be written
            by other means, as a value may be beyond the type's range; nothing was written.
        """
        table = self._rows_of(output, dtype)
        if table is None or (table.dtype != dtype and (table.dtype, dtype) != (_FLOAT32, _FLOAT64)):
            return None
        described = _described(spans)
        if described is None:
            return None
        parts, rows = described
        outside = self._library.decode(
            parts, len(spans), rows, table.ctypes.data, _LATENTS[table.dtype], *table.shape, search_threads()
        )
        return not outside


def _described(spans: Sequence[Span]) -> tuple[bytes, int] | None:
    """Return the parts, and their rows in all; None if an array has a form that compiled code does not read."""
    parts: list[bytes] = []
    rows = 0
    for latents, indices, layout, start, stop in spans:
        form = _form(latents.dtype, latents.shape, layout, indices.dtype)
        if form is None or not (latents.flags.c_contiguous and indices.flags.c_contiguous):
            return None
        parts += (form, _PLACE.pack(_address(latents), _address(indices), start, stop - start, rows))
        rows += stop - start
    return b"".join(parts), rows


def _address(array: Array) -> int:
    # A quarter of the time of `array.ctypes.data`.
    address: int = array.__array_interface__["data"][0]
    return address


# As many as there are known headers (rpc.headers).
@functools.lru_cache(maxsize=1024)
def _form(latents: np.dtype[Any], shape: tuple[int, ...], layout: Layout, indices: np.dtype[Any]) -> bytes | None:
    number, index_number = _LATENTS.get(latents), _INDICES.get(indices)
    if number is None or index_number is None:
        return None
    if layout is Layout.CHANNELS_LAST:
        channels, tokens = shape[-1], math.prod(shape[:-1])
        return _FORM.pack(number, tokens, tokens * channels, channels, 1, index_number)
    channels, tokens = shape[1], math.prod(shape[2:])
    return _FORM.pack(number, tokens, channels * tokens, 1, tokens, index_number)
