"""How many indices there are decides which type they have."""

from __future__ import annotations

import numpy as np

_UNSIGNED = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.uint32))


def smallest_unsigned(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Return the smallest unsigned type that holds every index in [0, vocab_size)."""
    return next((dtype for dtype in _UNSIGNED if vocab_size <= 1 << 8 * dtype.itemsize), _UNSIGNED[-1])
