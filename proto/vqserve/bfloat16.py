"""bfloat16 for numpy, which has no such type: the upper half of a float32."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def widen(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Return bfloat16 bit patterns as float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Return float32 values as bfloat16 bit patterns, rounded to nearest even; a NaN stays one."""
    bits = np.asarray(values, dtype=np.float32, order="C").view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)
