"""What must be true of the elements of a caller's arrays before anything is computed.

Shared by the server's edge, the tokenizer and the tools; numpy only, so that the gRPC layer can refuse a request
without torch. The rest of a request, options and shapes, is checked by `vqserve.validation`, as the SDK does.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from vqserve import bfloat16
from vqserve.validation import not_an_index, not_finite, not_indices

_BFLOAT16_EXPONENT = np.uint16(0x7F80)


def first_non_finite(array: npt.NDArray[np.floating[Any]]) -> tuple[int, ...] | None:
    """Return the position of the first NaN or infinity in C order, or None."""
    if array.size == 0:
        return None
    if array.dtype == np.float16:
        # numpy computes on float16 by converting each element: its exponent bits say as much, ten times faster.
        finite = (array.view(np.uint16) & np.uint16(0x7C00)) != np.uint16(0x7C00)
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

    Args:
        array: of any floating-point type; uint16 is bfloat16's bit patterns.

    Raises:
        NonFiniteLatents: names the first one's position: "latents[0, 3, 5, 7] is nan".
    """
    if array.dtype == np.uint16:
        if not ((array & _BFLOAT16_EXPONENT) == _BFLOAT16_EXPONENT).any():
            return
        array = bfloat16.widen(array)
    position = first_non_finite(array)
    if position is not None:
        raise not_finite(position, float(array[position]))


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
        raise not_indices(array.dtype)
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
    raise not_an_index(position, int(array[position]), decodable)
