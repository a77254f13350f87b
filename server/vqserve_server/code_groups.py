"""Counters for the codes of a codebook, in a bounded number."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

# Counters of a codebook: above that, neighbouring codes share one. Scalar quantizers can have 2^32 codes.
_MOST_GROUPS = 1 << 20


@dataclass(frozen=True)
class CodeGroups:
    """The counters of a codebook's codes: one for each code, or for each group of neighbouring codes if there are many.

    Each stage has its groups, and after them one counter for indices that stand for no code (those that a remap
    reports for unknown codes).

    Attributes:
        sizes: number of codes of each stage.
    """

    sizes: tuple[int, ...]

    @cached_property
    def codes_per_group(self) -> int:
        """Number of codes that share a counter: a power of two."""
        shift = 0
        while sum(-(-size >> shift) for size in self.sizes) > _MOST_GROUPS:
            shift += 1
        return 1 << shift

    @cached_property
    def stages(self) -> tuple[slice, ...]:
        """For each stage, where its groups are among the counters; the counter after them is for no code."""
        slices, start = [], 0
        for size in self.sizes:
            stop = start - (-size // self.codes_per_group)
            slices.append(slice(start, stop))
            start = stop + 1
        return tuple(slices)

    @property
    def total(self) -> int:
        """Number of counters."""
        return int(self.stages[-1].stop) + 1

    def places(self, indices: Ints) -> Ints:
        """Return the counter of each index.

        Args:
            indices: (n, q) for the first q stages.

        Returns:
            (n, q) in [0, total).
        """
        count = indices.shape[1]
        starts, stops, sizes = self._bounds
        places = indices // self.codes_per_group + starts[:count]
        return np.where((indices >= 0) & (indices < sizes[:count]), places, stops[:count])

    @cached_property
    def _bounds(self) -> tuple[Ints, Ints, Ints]:
        starts, stops = zip(*((stage.start, stage.stop) for stage in self.stages), strict=True)
        return np.array(starts), np.array(stops), np.array(self.sizes)
