"""What must be true of a caller's arrays and options before anything is computed.

Shared by the server's edge and the tokenizer; numpy only, so that the gRPC layer can refuse a request without torch.
Every message names the offender by its position in the caller's own array, and nothing of the server.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt

from vqserve import dtypes
from vqserve.codebook_info import CodebookInfo, wrong_count
from vqserve.layout import Layout, channel_axis, parse_layout, resolve_layout, wrong_channels, wrong_stages
from vqserve.refused import not_indices
from vqserve_server.errors import (
    DigestMismatch,
    IndexOutOfRange,
    InvalidDtype,
    InvalidOption,
    InvalidShape,
    NonFiniteLatents,
)

# Positions and byte counts are signed 64-bit numbers everywhere below.
_MAX_ELEMENTS = (1 << 63) // 8
_DIGEST_CHARACTERS = 64


def check_digest(expected: str, *, info: CodebookInfo) -> None:
    """Refuse a codebook that is not the one that the caller pinned.

    Raises:
        DigestMismatch: names both digests.
    """
    if expected != info.digest:
        raise DigestMismatch(f"codebook {info.name!r} has digest {info.digest}, not {expected[:_DIGEST_CHARACTERS]!r}")


def check_layout(rank: int, layout: str | None, *, info: CodebookInfo) -> Layout:
    """Return the layout of latents of this rank.

    Raises:
        InvalidOption: `layout` is not the name of one.
        InvalidShape: the rank is not 2 to 5, or the layout needs more axes.
    """
    try:
        asked = parse_layout(layout)
    except ValueError as error:
        raise InvalidOption(str(error)) from None
    try:
        return resolve_layout(rank, asked, info.layout)
    except ValueError as error:
        raise InvalidShape(str(error)) from None


def check_latents(shape: Sequence[int], layout: str | None, *, info: CodebookInfo) -> Layout:
    """Return the layout of latents whose shape the codebook takes.

    Args:
        shape: of the latents.
        layout: "channels_first", "channels_last" or None, the codebook's default.
        info: the codebook.

    Raises:
        InvalidOption: `layout` is not the name of one.
        InvalidShape: the rank is not 2 to 5, the channel count is not `info.input_dim`, or a size overflows.
    """
    shape = tuple(shape)
    resolved = check_layout(len(shape), layout, info=info)
    if shape[channel_axis(resolved)] != info.input_dim:
        raise InvalidShape(wrong_channels(shape, resolved, info.input_dim))
    # An empty axis lets the others be as large as they like: the reply would not be addressable.
    if math.prod(max(length, 1) for length in shape) > _MAX_ELEMENTS:
        raise InvalidShape(f"latents of shape {shape} are too large")
    return resolved


def check_indices_shape(
    shape: Sequence[int], layout: str | None, *, info: CodebookInfo, num_quantizers: object = None
) -> Layout:
    """Return the layout of the latents that indices of this shape decode to.

    Args:
        shape: of the indices: 1 to 4 axes; of a residual codebook the 2 to 5 of their latents, with the indices of a
            token in the place of the channels.
        layout: as in `check_latents`.
        info: the codebook.
        num_quantizers: how many of each token's indices are to be decoded; None: all that the codebook has. There may
            be more, up to those.

    Raises:
        InvalidOption: num_quantizers is no integer in [1, info.num_quantizers].
        InvalidShape: the indices have too few or too many axes, the layout needs more, a token has too few or too
            many indices, or a size overflows.
    """
    shape = tuple(shape)
    wanted = check_num_quantizers(num_quantizers, available=info.num_quantizers)
    ranks = (2, 5) if info.has_stages else (1, 4)
    if not ranks[0] <= len(shape) <= ranks[1]:
        raise InvalidShape(f"indices must have {ranks[0]} to {ranks[1]} axes, not {len(shape)}")
    if math.prod(max(length, 1) for length in shape) * max(info.output_dim, info.code_dim) > _MAX_ELEMENTS:
        raise InvalidShape(f"indices of shape {shape} decode to more than can be held")
    if not info.has_stages:
        return check_layout(len(shape) + 1, layout, info=info)
    resolved = check_layout(len(shape), layout, info=info)
    check_stages(shape, resolved, wanted=wanted, available=info.num_quantizers)
    return resolved


def check_output(output: str, *, info: CodebookInfo) -> None:
    """Refuse code rows of a residual codebook.

    Raises:
        InvalidOption: the codebook has a code row for each index, and none for a token.
    """
    if output == "code_rows" and info.has_stages:
        raise InvalidOption(f"codebook {info.name!r} has stages: its tokens have latents, but no code rows")


def check_num_quantizers(asked: object, *, available: int) -> int:
    """Return how many of a codebook's indices per token are meant.

    Args:
        asked: what the caller wants; None: all.
        available: `CodebookInfo.num_quantizers`.

    Raises:
        InvalidOption: it is no integer in [1, available].
    """
    if asked is None:
        return available
    if not isinstance(asked, Integral) or isinstance(asked, bool) or not 1 <= int(asked) <= available:
        raise InvalidOption(wrong_count(asked, available))
    return int(asked)


def check_stages(shape: Sequence[int], layout: Layout, *, wanted: int, available: int) -> None:
    """Refuse indices of a residual codebook without an axis of as many indices per token as are to be decoded.

    Args:
        shape: of the indices, which have the rank of their latents.
        layout: where the latents' channels are, and the indices of a token.
        wanted: indices per token that decode is to read, the first ones.
        available: that the codebook has.

    Raises:
        InvalidShape: that axis is shorter than `wanted` or longer than `available`.
    """
    if not wanted <= shape[channel_axis(layout)] <= available:
        raise InvalidShape(wrong_stages(shape, layout, wanted=wanted, available=available))


def first_non_finite(array: npt.NDArray[Any]) -> tuple[int, ...] | None:
    """Return the position of the first NaN or infinity of latents or weights in C order, or None.

    Args:
        array: of a type's `storage` (vqserve.dtypes).
    """
    if array.size == 0:
        return None
    exponent = dtypes.of_latents(array.dtype).exponent
    if exponent and array.dtype.isnative:
        # numpy computes on float16 by converting each element: its exponent bits say as much, ten times faster.
        bits = array.view(f"u{array.itemsize}")
        mask = bits.dtype.type(exponent)
        finite = (bits & mask) != mask
    else:
        # The extremes carry every NaN and infinity and need no array of their own.
        with np.errstate(invalid="ignore"):
            if math.isfinite(array.min()) and math.isfinite(array.max()):
                return None
        finite = np.isfinite(array)
    if finite.all():
        return None
    return tuple(int(i) for i in np.unravel_index(int(finite.argmin()), array.shape))


def check_finite(array: npt.NDArray[Any]) -> None:
    """Refuse latents with NaN or infinity.

    Raises:
        NonFiniteLatents: names the first one's position: "latents[0, 3, 5, 7] is nan".
    """
    position = first_non_finite(array)
    if position is not None:
        value = float(dtypes.of_latents(array.dtype).widen(array[position]))
        raise NonFiniteLatents(f"latents{list(position)} is {value}")


def check_indices(array: npt.NDArray[np.integer[Any]], *, decodable: int) -> None:
    """Refuse indices outside [0, decodable).

    Args:
        array: indices of any integer type and shape; compared as they are, so nothing wraps.
        decodable: the exclusive bound.

    Raises:
        InvalidDtype: the array does not hold integers (bool does not).
        IndexOutOfRange: names the first offender's position, its value and the range.
    """
    if array.dtype.kind not in "iu":
        raise InvalidDtype(not_indices(array.dtype))
    if array.size == 0:
        return
    low, high = int(array.min()), int(array.max())
    if low >= 0 and high < decodable:
        return
    # `decodable` may not fit the array's own type: then it bounds nothing from above.
    outside = array < 0
    if high >= decodable:
        outside |= array >= np.asarray(decodable).astype(array.dtype)
    position = tuple(int(i) for i in np.unravel_index(int(outside.argmax()), array.shape))
    raise IndexOutOfRange(f"indices{list(position)} is {int(array[position])}, not in [0, {decodable})")
