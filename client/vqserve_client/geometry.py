"""What a codebook makes of the shape of a caller's array."""

from __future__ import annotations

from vqserve.codebook_info import CodebookInfo
from vqserve.layout import (
    Layout,
    channel_axis,
    grid_shape,
    resolve_layout,
    warn_of_an_image,
    wrong_channels,
    wrong_stages,
)

Geometry = tuple[tuple[int, ...], Layout]


def latents_geometry(shape: tuple[int, ...], layout: Layout | None, info: CodebookInfo) -> Geometry:
    """Return the grid of tokens and the layout of latents of this shape.

    Args:
        shape: of the latents.
        layout: what the caller asked for; None: the codebook's default.
        info: the codebook.

    Raises:
        ValueError: the rank or the channel count is not the codebook's.
    """
    resolved = resolve_layout(len(shape), layout, info.layout)
    if shape[channel_axis(resolved)] != info.input_dim:
        raise ValueError(wrong_channels(shape, resolved, info.input_dim))
    warn_of_an_image(shape, layout, info.layout)
    return grid_shape(shape, resolved), resolved


def indices_geometry(
    shape: tuple[int, ...], layout: Layout | None, info: CodebookInfo, *, stages: int | None
) -> Geometry:
    """Return the grid of tokens of indices of this shape and the layout of the latents that they decode to.

    Args:
        shape: of the indices.
        layout: what the caller asked for; None: the codebook's default.
        info: the codebook.
        stages: how many indices of each token are read; None: its one, without an axis of them.

    Raises:
        ValueError: the rank, or the number of indices for a token, is not the codebook's.
    """
    fewest, most = (1, 4) if stages is None else (2, 5)
    if not fewest <= len(shape) <= most:
        raise ValueError(f"indices must have {fewest} to {most} axes, not {len(shape)}")
    if stages is None:
        return shape, resolve_layout(len(shape) + 1, layout, info.layout)
    resolved = resolve_layout(len(shape), layout, info.layout)
    if not stages <= shape[channel_axis(resolved)] <= info.num_quantizers:
        raise ValueError(wrong_stages(shape, resolved, wanted=stages, available=info.num_quantizers))
    return grid_shape(shape, resolved), resolved
