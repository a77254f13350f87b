"""Arrays that end where memory ends: code that reads or writes beyond them ends the process."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np


def fenced(array: np.ndarray, *, before: int = 0) -> np.ndarray:
    """Return a copy whose last byte is the last one before a page that nobody may touch.

    Args:
        array: the values.
        before: bytes between the end of the array and that page: another alignment.
    """
    size = array.nbytes + before
    length = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, length + mmap.PAGESIZE)
    whole = np.frombuffer(memory, np.uint8)
    fence = ctypes.c_void_p(whole.ctypes.data + length)
    assert ctypes.CDLL(None, use_errno=True).mprotect(fence, mmap.PAGESIZE, 0) == 0
    copy: Any = whole[length - size : length - before].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
