"""Memory of codebooks that were replaced, given back to the system."""

from __future__ import annotations

import ctypes
import gc


def give_back() -> None:
    """Free what refers to itself in circles, and give free memory back to the system.

    The traceback of a refused request is such a circle, and holds the codebook that refused it. glibc keeps tables that
    were freed in the middle of its heaps, and after a hundred swaps there are many such holes.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
