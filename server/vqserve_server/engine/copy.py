"""Copies latents of any layout to rows, widened, and rows to latents, rounded; each in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from vqserve import dtypes
from vqserve.layout import Layout

Array = npt.NDArray[Any]

# Up to this many channels, one long copy per channel takes a quarter of the time of one short copy per token.
_FEW_CHANNELS = 8
# Of fewer values the calls take longer than the copies.
_MANY_VALUES = 1024


def _pieces(latents: Array, layout: Layout, start: int, stop: int) -> Iterator[tuple[Array, slice]]:
    """Yield views (..., C) of the tokens [start, stop), each with its range of rows counted from `start`."""
    if layout is Layout.CHANNELS_LAST:
        yield latents.reshape(-1, latents.shape[-1])[start:stop], slice(0, stop - start)
        return
    # (b, C, s): whole images are one view, the ends of a part may lie inside one.
    images = latents.reshape(latents.shape[0], latents.shape[1], -1)
    size = images.shape[2]
    position = start
    while position < stop:
        image, offset = divmod(position, size)
        if offset or stop - position < size:
            length = min(size - offset, stop - position)
            view = images[image, :, offset : offset + length].T
        else:
            whole = (stop - position) // size
            length = whole * size
            view = images[image : image + whole].transpose(0, 2, 1)
        yield view, slice(position - start, position - start + length)
        position += length


def read_tokens(array: Array, layout: Layout, start: int, stop: int, into: Array) -> None:
    """Copy the values of the tokens [start, stop), of any type, into rows.

    Args:
        array: (b, n, ...) or (..., n).
        layout: which of the two.
        start: the first token, in C order of the grid.
        stop: the token after the last.
        into: (stop - start, n), C order, of a type that holds the values.
    """
    for view, rows in _pieces(array, layout, start, stop):
        into[rows].reshape(view.shape)[...] = view


def write_tokens(rows: Array, array: Array, layout: Layout, start: int) -> None:
    """Copy rows to the tokens from `start` on, as numpy casts.

    Args:
        rows: (m, n).
        array: (b, n, ...) or (..., n), to be written.
        layout: which of the two.
        start: the first token, in C order of the grid.
    """
    for view, part in _pieces(array, layout, start, start + len(rows)):
        view[...] = rows[part].reshape(view.shape)


def read_rows(latents: Array, layout: Layout, start: int, stop: int, into: Array) -> None:
    """Copy the tokens [start, stop) of latents into rows.

    Args:
        latents: (b, C, ...) or (..., C), of a type's `storage` (vqserve.dtypes).
        layout: which of the two.
        start: the first token, in C order of the grid.
        stop: the token after the last.
        into: (stop - start, C), C order, float32 or float64; every value fits.
    """
    coding = dtypes.LATENTS_BY_STORAGE[latents.dtype].coding
    for view, rows in _pieces(latents, layout, start, stop):
        target = into[rows].reshape(view.shape)
        if coding is not None:
            coding.widen_into(view, target)
        elif layout is Layout.CHANNELS_FIRST and view.shape[-1] <= _FEW_CHANNELS and view.size >= _MANY_VALUES:
            for channel in range(view.shape[-1]):
                target[..., channel] = view[..., channel]
        else:
            target[...] = view


def write_rows(rows: Array, latents: Array, layout: Layout, start: int) -> None:
    """Copy rows to the tokens from `start` on, each value rounded once, to nearest even.

    Args:
        rows: (n, C), float32 or float64, without a `first_overflow`; or of the latents' own type.
        latents: (b, C, ...) or (..., C); as in `read_rows`, but written.
        layout: which of the two.
        start: the first token, in C order of the grid.
    """
    dtype = dtypes.LATENTS_BY_STORAGE[latents.dtype]
    if dtype.coding is not None:
        rows = dtype.narrow(rows)
    if rows.dtype == latents.dtype:
        write_tokens(rows, latents, layout, start)
        return
    with np.errstate(under="ignore"):
        write_tokens(rows, latents, layout, start)


def first_overflow(rows: Array, dtype: np.dtype[Any]) -> int | None:
    """Return the first row with a value that is infinity once rounded to a type, or None.

    Args:
        rows: (n, C), float32 or float64, finite; or of `dtype`, and then there is none.
        dtype: a type's `storage` (vqserve.dtypes).
    """
    limit = dtypes.LATENTS_BY_STORAGE[dtype].overflow
    if math.isinf(limit) or dtype == rows.dtype or not rows.size:
        return None
    if rows.max() < limit and rows.min() > -limit:
        return None
    return int((np.abs(rows) >= limit).any(axis=1).argmax())
