"""The tokens of a quantizer's latents as rows, and checks of their shapes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vqserve.dtypes import LATENTS, of_torch
from vqserve.layout import Layout, grid_shape, num_rows, resolve_layout
from vqserve.validation import check_channels, not_latents
from vqserve_server import rows as token_rows
from vqserve_server.errors import InvalidShape


def layout_of(rank: int, default: Layout | None = None) -> Layout:
    """Return the layout of latents of 2 to 5 axes: the default from 3 axes up, and last for 2.

    Args:
        rank: axes.
        default: a quantizer's `layout`; None: channels first for 4 and 5 axes, last for 3.

    Raises:
        InvalidShape: for any other rank.
    """
    return resolve_layout(rank, None, default)


def grid_of(z: Tensor, channels: int, default: Layout | None = None) -> tuple[int, ...]:
    """Return the shape of the tokens of latents.

    Args:
        z: (b, C, h, w), (b, C, t, h, w), (b, s, C) or (n, C), or as `default` says; floating point.
        channels: the C that is expected.
        default: as in `layout_of`.

    Raises:
        InvalidDtype: z is not of a type of latents.
        InvalidShape: another rank, or another channel count.
    """
    shape = tuple(z.shape)
    if of_torch(z.dtype) not in LATENTS:
        raise not_latents(z.dtype)
    layout = layout_of(z.ndim, default)
    check_channels(shape, layout, channels)
    return grid_shape(shape, layout)


def to_rows(z: Tensor, default: Layout | None = None) -> Tensor:
    """Return latents of 2 to 5 axes as rows (N, C), in the order of the flattened grid; `default` as in `layout_of`."""
    return token_rows.to_rows(z, layout_of(z.ndim, default))


def from_rows(rows: Tensor, grid: Sequence[int], default: Layout | None = None) -> Tensor:
    """Return rows (N, C) as contiguous latents over a grid of 1 to 4 axes: the inverse of `to_rows`."""
    return token_rows.from_rows(rows, grid, layout_of(len(grid) + 1, default))


def grid_of_entries(shape: Sequence[int], *, width: int, count: int) -> tuple[int, ...]:
    """Return the grid of code rows whose channel-last shape a caller gives.

    Args:
        shape: 2 to 5 axes, the last of them the code rows' width.
        width: of a code row.
        count: indices that there are.

    Raises:
        InvalidShape: the shape does not end in the width, or holds another number of tokens.
    """
    shape = tuple(shape)
    tokens = num_rows(shape[:-1]) if min(shape, default=-1) >= 0 else -1
    if not 2 <= len(shape) <= 5 or shape[-1] != width or tokens != count:
        raise InvalidShape(
            f"entries of shape {shape} do not fit {count} indices and codes of width {width}: "
            "a shape is channel-last and has 2 to 5 axes"
        )
    return shape[:-1]


def check_not_empty(grid: Sequence[int]) -> None:
    """Refuse a batch without tokens, whose means would be NaN.

    Raises:
        InvalidShape: the grid holds no token.
    """
    if num_rows(grid) == 0:
        raise InvalidShape(f"a grid of shape {tuple(grid)} holds no tokens: forward needs at least one")
