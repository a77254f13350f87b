"""The position of the channel axis in latents, and the shapes that follow from it."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Sequence
from enum import StrEnum
from types import EllipsisType

from vqserve.errors import InvalidOption, InvalidShape, LayoutWarning, quoted

LATENT_RANKS = (2, 3, 4, 5)
# A warning names the line of the program that uses them.
_OWN_PACKAGES = ("vqserve", "vqserve_client", "vqserve_server", "vqserve_tools")


class Layout(StrEnum):
    """Position of the channel axis: the second or the last."""

    CHANNELS_FIRST = "channels_first"
    CHANNELS_LAST = "channels_last"


def parse_layout(layout: str | None) -> Layout | None:
    """Return the layout of a name; None (the codebook's default) stays None.

    Raises:
        InvalidOption: there is no layout of that name.
    """
    if layout is None:
        return None
    try:
        return Layout(layout)
    except ValueError:
        names = ", ".join(repr(str(known)) for known in Layout)
        raise InvalidOption(
            f"{{option}} must be one of {names} or None, not {quoted(layout)}", option="layout"
        ) from None


def resolve_layout(rank: int, layout: Layout | None, default: Layout | None = None, *, batched: bool = True) -> Layout:
    """Return the layout of a latent array of this rank.

    Args:
        rank: number of axes of the latents, 2 to 5.
        layout: layout that the caller gave; None: the default.
        default: default of the codebook; None: channels first for 4 and 5 axes, last for 2 and 3.
        batched: False: the first of these axes was added to the caller's array, and is not in the error.

    Raises:
        InvalidShape: the rank is another, or the layout is channels first for 2 axes, which have no batch axis.
    """
    if rank not in LATENT_RANKS:
        raise wrong_rank("latents", LATENT_RANKS, rank, batched=batched)
    if rank == 2:
        if layout is Layout.CHANNELS_FIRST:
            found, least = ("2 axes are (n, C)", 3) if batched else ("1 axis are (C,)", 2)
            raise InvalidShape(
                f"latents of {found}: channels_first needs at least {least} axes", array="latents", option="layout"
            )
        return Layout.CHANNELS_LAST
    if layout is not None:
        return layout
    if default is not None:
        return default
    return Layout.CHANNELS_FIRST if rank >= 4 else Layout.CHANNELS_LAST


def may_be_an_image(shape: Sequence[int], layout: Layout | None, default: Layout | None) -> bool:
    """Return whether latents could be one image without a batch axis as well as sequences; see `warn_of_an_image`."""
    return len(shape) == 3 and shape[0] == shape[2] and layout is None and default is None


def warn_of_an_image(shape: Sequence[int], layout: Layout | None, default: Layout | None) -> None:
    """Warn if latents of 3 axes could be one image (C, h, w) without a batch axis, as well as sequences (b, s, C).

    Args:
        shape: shape of the latents.
        layout: layout that the caller gave; None: the default. With a layout there is no warning.
        default: default of the codebook. With a default there is no warning.
    """
    if may_be_an_image(shape, layout, default):
        warnings.warn(
            LayoutWarning(
                f"latents of shape {tuple(shape)} are read as (b, s, C); if they are one image, (C, h, w), pass "
                "batched=False (--unbatched); if they are sequences, pass {suggestion}",
                {"layout": str(Layout.CHANNELS_LAST)},
            ),
            stacklevel=_level_of_the_caller(),
        )


def _level_of_the_caller() -> int:
    """Return the `stacklevel`, for the function that calls this one, of the first frame that is not vqserve's own."""
    level, frame = 0, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OWN_PACKAGES:
        level, frame = level + 1, frame.f_back
    return level


def wrong_rank(array: str, ranks: Sequence[int], rank: int, *, batched: bool = True) -> InvalidShape:
    """Return the error for an array whose number of axes is not in `ranks` (ascending).

    Args:
        array: name of the array.
        ranks: numbers of axes that it can have.
        rank: number of axes that it has.
        batched: False: one of these axes was added to the caller's array, and is not in the error.
    """
    added = 0 if batched else 1
    named = array if batched else f"{array} without a batch axis"
    text = f"{named} must have {ranks[0] - added} to {ranks[-1] - added} axes, not {rank - added}"
    return InvalidShape(text, array=array)


def channel_axis(layout: Layout) -> int:
    """Return the index of the channel axis."""
    return 1 if layout is Layout.CHANNELS_FIRST else -1


def first_channels(count: int, layout: Layout) -> tuple[EllipsisType | slice, ...]:
    """Return the index that selects the first channels of an array of this layout."""
    return (slice(None), slice(count)) if layout is Layout.CHANNELS_FIRST else (..., slice(count))


def grid_shape(latents_shape: Sequence[int], layout: Layout) -> tuple[int, ...]:
    """Return the shape without its channel axis: the shape of the indices."""
    shape = list(latents_shape)
    del shape[channel_axis(layout)]
    return tuple(shape)


def latents_shape(grid: Sequence[int], channels: int, layout: Layout) -> tuple[int, ...]:
    """Return the shape of the latents of a grid of tokens."""
    if layout is Layout.CHANNELS_FIRST:
        return (grid[0], channels, *grid[1:])
    return (*grid, channels)


def indices_shape(grid: Sequence[int], stages: int | None, layout: Layout) -> tuple[int, ...]:
    """Return the shape of the indices of a grid of tokens; stages take the place of the channels."""
    return tuple(grid) if stages is None else latents_shape(grid, stages, layout)


def num_rows(grid: Sequence[int]) -> int:
    """Return the number of tokens in a grid."""
    return math.prod(grid)
