"""Converts numpy arrays and torch tensors of tokens to rows and back; only this module maps layouts to axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
from einops import rearrange

from vqserve.layout import Layout

if TYPE_CHECKING:
    from torch import Tensor

    ArrayOrTensor = TypeVar("ArrayOrTensor", npt.NDArray[Any], Tensor)
else:
    ArrayOrTensor = TypeVar("ArrayOrTensor")


def to_rows(array: ArrayOrTensor, layout: Layout) -> ArrayOrTensor:
    """Return an array (b, c, ...) or (..., c) as rows (n, c), the tokens in C order of their grid; a view if possible.

    Args:
        array: array of 2 axes or more.
        layout: layout of the array.
    """
    rows: ArrayOrTensor = rearrange(
        array, "b c ... -> (b ...) c" if layout is Layout.CHANNELS_FIRST else "... c -> (...) c"
    )
    return rows


def from_rows(rows: ArrayOrTensor, grid: Sequence[int], layout: Layout) -> ArrayOrTensor:
    """Return rows (n, c) as a contiguous array over a grid of tokens: the inverse of `to_rows`."""
    first, *rest = (f"axis{number}" for number in range(len(grid)))
    axes = " ".join(rest)
    to = f"{first} c {axes}" if layout is Layout.CHANNELS_FIRST else f"{first} {axes} c"
    lengths = dict(zip((first, *rest), grid, strict=True))
    array: ArrayOrTensor = rearrange(rows, f"({first} {axes}) c -> {to}", **lengths)
    return np.ascontiguousarray(array) if isinstance(array, np.ndarray) else array.contiguous()


def channels_last(array: ArrayOrTensor, layout: Layout) -> ArrayOrTensor:
    """Return a view (..., c) of an array (b, c, ...) or (..., c)."""
    if layout is Layout.CHANNELS_LAST:
        return array
    view: ArrayOrTensor = rearrange(array, "b c ... -> b ... c")
    return view
