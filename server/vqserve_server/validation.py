"""Checks of the elements of a caller's arrays, before anything is computed.

The gRPC layer, the tokenizer and the tools share them. They need numpy only, so that the gRPC layer can reject a
request without torch. `vqserve.validation` checks options and shapes, also for the SDK.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vqserve import dtypes
from vqserve.stages import beyond_stages
from vqserve.validation import not_an_index, not_finite, not_indices


def first_non_finite(array: npt.NDArray[Any]) -> tuple[int, ...] | None:
    """Return the position of the first NaN or infinity of latents or weights in C order, or None.

    Args:
        array: array of a type's `storage` (vqserve.dtypes).
    """
    if array.size == 0:
        return None
    exponent = dtypes.LATENTS_BY_STORAGE[array.dtype].exponent
    if exponent and array.dtype.isnative:
        # numpy converts each float16 element to compute with it; comparing exponent bits is ten times faster.
        bits = array.view(f"u{array.itemsize}")
        mask = bits.dtype.type(exponent)
        finite = (bits & mask) != mask
    else:
        # The minimum or maximum is NaN or infinite if any element is, and needs no further array.
        with np.errstate(invalid="ignore"):
            if math.isfinite(array.min()) and math.isfinite(array.max()):
                return None
        finite = np.isfinite(array)
    if finite.all():
        return None
    return tuple(int(i) for i in np.unravel_index(int(finite.argmin()), array.shape))


def check_finite(array: npt.NDArray[Any]) -> None:
    """Check that latents have no NaN or infinity.

    Args:
        array: array of a type's `storage` (vqserve.dtypes).

    Raises:
        NonFiniteLatents: an element is not finite; the error names the first: "latents[0, 3, 5, 7] is nan".
    """
    position = first_non_finite(array)
    if position is not None:
        value = float(dtypes.LATENTS_BY_STORAGE[array.dtype].widen(array[position]))
        raise not_finite(position, value)


def check_indices(
    array: npt.NDArray[np.integer[Any]], *, decodable: int, stage_sizes: Sequence[int] = (), axis: int = -1
) -> None:
    """Check that indices lie in [0, decodable), or in the vocabularies of their stages.

    Args:
        array: indices of any integer type and shape; they are compared without conversion, so none wraps.
        decodable: exclusive upper bound; of several stages, the largest.
        stage_sizes: exclusive upper bound of each stage, where these differ.
        axis: axis of a token's indices, with as many elements as there are stages or fewer.

    Raises:
        InvalidDtype: the array does not hold integers (bool does not count).
        IndexOutOfRange: an index is outside; the error names the position and value of the first, and the range.
    """
    if array.dtype.kind not in "iu":
        raise not_indices(array.dtype)
    if array.size == 0:
        return
    low, high = int(array.min()), int(array.max())
    if low >= 0 and high < min(stage_sizes, default=decodable):
        return
    outside = array < 0
    if stage_sizes:
        outside |= beyond_stages(array, stage_sizes, axis)
        if not outside.any():
            return
    elif high >= decodable:
        # If `decodable` does not fit the array's type, no element can exceed it.
        outside |= array >= np.asarray(decodable).astype(array.dtype)
    position = tuple(int(i) for i in np.unravel_index(int(outside.argmax()), array.shape))
    value = int(array[position])
    if not stage_sizes:
        raise not_an_index(position, value, decodable)
    raise not_an_index(position, value, stage_sizes[position[axis]], stage=position[axis])
