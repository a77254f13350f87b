"""Checks of latents and weights, before anything is computed.

The gRPC layer, the tokenizer and the tools share them. They need numpy only, so that the gRPC layer can reject a
request without torch. `vqserve.validation` has what the SDK checks as well.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from vqserve import dtypes
from vqserve.validation import not_finite

# Of so few values an array of truth values costs less than two passes and a change of numpy's error state.
_FEW = 16_384


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
    elif array.size <= _FEW:
        finite = np.isfinite(array)
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
