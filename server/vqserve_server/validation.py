"""What must be true of the elements of a caller's arrays before anything is computed.

Shared by the server's edge, the tokenizer and the tools; numpy only, so that the gRPC layer can refuse a request
without torch. The rest of a request, options and shapes, is checked by `vqserve.validation`, as the SDK does.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from vqserve import dtypes
from vqserve.validation import not_an_index, not_finite, not_indices


def first_non_finite(array: npt.NDArray[Any]) -> tuple[int, ...] | None:
    """Return the position of the first NaN or infinity of latents or weights in C order, or None.

    Args:
        array: of a type's `storage` (vqserve.dtypes).
    """
    if array.size == 0:
        return None
    exponent = dtypes.LATENTS_BY_STORAGE[array.dtype].exponent
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

    Args:
        array: of a type's `storage` (vqserve.dtypes).

    Raises:
        NonFiniteLatents: names the first one's position: "latents[0, 3, 5, 7] is nan".
    """
    position = first_non_finite(array)
    if position is not None:
        value = float(dtypes.LATENTS_BY_STORAGE[array.dtype].widen(array[position]))
        raise not_finite(position, value)


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
