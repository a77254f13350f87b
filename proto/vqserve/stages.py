"""Indices of residual codebooks whose stages have different vocabularies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def beyond_stages(indices: npt.NDArray[Any], sizes: Sequence[int], axis: int) -> npt.NDArray[np.bool_]:
    """Return where indices are not below the vocabulary size of their stage, bool of their shape.

    Args:
        indices: indices of any integer type, of the first stages or of all.
        sizes: vocabulary size of each stage.
        axis: axis of a token's indices.
    """
    # The largest value of the array's type stands for a size that the type does not hold: no element exceeds it.
    most = int(np.iinfo(indices.dtype).max)
    shape = [1] * indices.ndim
    shape[axis] = indices.shape[axis]
    last = np.array([min(size - 1, most) for size in sizes[: indices.shape[axis]]], indices.dtype)
    return indices > last.reshape(shape)
