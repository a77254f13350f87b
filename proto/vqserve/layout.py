"""Where the channels of a latent array are, and what that makes of its shape."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from enum import StrEnum
from types import EllipsisType

LATENT_RANKS = (2, 3, 4, 5)


class Layout(StrEnum):
    """Position of the channel axis: the second or the last."""

    CHANNELS_FIRST = "channels_first"
    CHANNELS_LAST = "channels_last"


def parse_layout(layout: str | None) -> Layout | None:
    """Return the layout of that name; None (the codebook's default) stays None.

    Raises:
        ValueError: for any other name.
    """
    if layout is None:
        return None
    try:
        return Layout(layout)
    except ValueError:
        names = ", ".join(repr(str(known)) for known in Layout)
        raise ValueError(f"layout must be one of {names} or None, not {layout!r}") from None


def resolve_layout(rank: int, layout: Layout | None, default: Layout | None = None) -> Layout:
    """Return the layout of a latent array of this rank.

    Args:
        rank: axes of the latent array, 2 to 5.
        layout: what the caller asked for; None: the default.
        default: the codebook's default; None: channels first for 4 and 5 axes, last for 2 and 3.

    Raises:
        ValueError: for another rank, and for channels first on 2 axes, which have no batch axis before the channels.
    """
    if rank not in LATENT_RANKS:
        raise ValueError(f"latents must have 2 to 5 axes, not {rank}")
    if rank == 2:
        if layout is Layout.CHANNELS_FIRST:
            raise ValueError("latents of 2 axes are (n, C): channels_first needs at least 3 axes")
        return Layout.CHANNELS_LAST
    if layout is not None:
        return layout
    if default is not None:
        return default
    return Layout.CHANNELS_FIRST if rank >= 4 else Layout.CHANNELS_LAST


def warn_of_an_image(shape: Sequence[int], layout: Layout | None, default: Layout | None) -> None:
    """Warn where one image without a batch axis, (C, h, w), would pass for sequences, (b, s, C), and give other tokens.

    Args:
        shape: of the latents.
        layout: what the caller asked for, which settles it; None: the default.
        default: the codebook's default, which settles it too.
    """
    if len(shape) == 3 and shape[0] == shape[2] and layout is None and default is None:
        warnings.warn(
            f"latents of shape {tuple(shape)} are read as (b, s, C); if they are one image, (C, h, w), give "
            f'latents[None]; if not, layout="{Layout.CHANNELS_LAST}" says so',
            stacklevel=2,
        )


def channel_axis(layout: Layout) -> int:
    """Return the index of the channel axis."""
    return 1 if layout is Layout.CHANNELS_FIRST else -1


def first_channels(count: int, layout: Layout) -> tuple[EllipsisType | slice, ...]:
    """Return by what an array of this layout is cut to its first channels."""
    return (slice(None), slice(count)) if layout is Layout.CHANNELS_FIRST else (..., slice(count))


def wrong_channels(shape: Sequence[int], layout: Layout, channels: int) -> str:
    """Return what to tell whoever gave latents of this shape to a codebook of so many channels.

    Args:
        shape: of the latents, whose channel axis has another length than `channels`.
        layout: how the shape was read.
        channels: what the codebook takes.
    """
    found = shape[channel_axis(layout)]
    text = f"latents of shape {tuple(shape)} have {found} channels in layout {layout}, the codebook takes {channels}"
    other = Layout.CHANNELS_FIRST if layout is Layout.CHANNELS_LAST else Layout.CHANNELS_LAST
    # Latents of two axes have their channels last.
    if len(shape) > 2 and shape[channel_axis(other)] == channels:
        return f'{text}: should it be layout="{other}"?'
    if len(shape) in (3, 4) and shape[0] == channels:
        return f"{text}: without a batch axis? latents[None] has one"
    return text


def wrong_stages(shape: Sequence[int], layout: Layout, *, wanted: int, available: int) -> str:
    """Return what to tell whoever gave indices of this shape, with an axis of stages that does not fit.

    Args:
        shape: of the indices, which have the rank of their latents.
        layout: how the shape was read.
        wanted: indices per token that decode is to read.
        available: that the codebook has.
    """
    found = shape[channel_axis(layout)]
    which = str(available) if wanted == available else f"{wanted} to {available}"
    hint = ""
    if layout is Layout.CHANNELS_FIRST and wanted <= shape[0] <= available:
        hint = ": are they (n_q, b, ...)? swapaxes(0, 1) first"
    elif found < wanted == available:
        hint = ": say num_quantizers= to decode fewer"
    return f"indices of shape {tuple(shape)} have {found} for a token in layout {layout}, expected {which}{hint}"


def grid_shape(latents_shape: Sequence[int], layout: Layout) -> tuple[int, ...]:
    """Return the shape without its channel axis: the shape of the indices."""
    shape = list(latents_shape)
    del shape[channel_axis(layout)]
    return tuple(shape)


def latents_shape(grid: Sequence[int], channels: int, layout: Layout) -> tuple[int, ...]:
    """Return the shape of the latents that belong to indices of shape `grid`."""
    if layout is Layout.CHANNELS_FIRST:
        return (grid[0], channels, *grid[1:])
    return (*grid, channels)


def indices_shape(grid: Sequence[int], stages: int | None, layout: Layout) -> tuple[int, ...]:
    """Return the shape of the indices of a grid of tokens: with stages, so many stand in the place of the channels."""
    return tuple(grid) if stages is None else latents_shape(grid, stages, layout)


def num_rows(grid: Sequence[int]) -> int:
    """Return the number of tokens in a grid."""
    return math.prod(grid)
