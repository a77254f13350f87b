"""Percentiles of any number of values, in a fixed amount of memory."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# A bin is all values with the same sign, exponent and leading 14 bits as a float32: less than 2^-14 wide, relatively.
_DROPPED_BITS = 9
_LARGEST = float(np.finfo(np.float32).max)


class Spread:
    """Counts values that are not negative in some four million bins."""

    def __init__(self) -> None:
        self._counts = np.zeros(1 << (31 - _DROPPED_BITS), np.int64)
        self.max = 0.0

    def add(self, values: Floats) -> None:
        """Count values (n,); those beyond float32's range as its largest."""
        if values.size:
            self.max = max(self.max, float(values.max()))
            bits = np.minimum(values, _LARGEST).astype(np.float32).view(np.uint32)
            bins, counts = np.unique(bits >> _DROPPED_BITS, return_counts=True)
            self._counts[bins] += counts

    def percentile(self, percent: float) -> float:
        """Return the value that `percent` of the values do not exceed, within 2^-14 of it; there must be values."""
        up_to = np.cumsum(self._counts)
        place = np.searchsorted(up_to, max(1, math.ceil(percent / 100 * int(up_to[-1]))))
        return min(self.max, float(_middles(np.array([place]))[0]))

    def values_and_counts(self) -> tuple[Floats, npt.NDArray[np.int64]]:
        """Return a value for each bin that has any, ascending, and how many it has."""
        places = np.nonzero(self._counts)[0]
        return _middles(places), self._counts[places]


def _middles(bins: npt.NDArray[np.int64]) -> Floats:
    bits = (bins.astype(np.uint32) << _DROPPED_BITS) + np.uint32(1 << (_DROPPED_BITS - 1))
    # The first bin is that of zero.
    return np.where(bins == 0, 0.0, bits.view(np.float32).astype(np.float64))
