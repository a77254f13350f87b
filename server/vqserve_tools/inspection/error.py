"""How much quantization takes away."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

Floats = npt.NDArray[np.float64]

# A bin is all values with the same sign, exponent and leading 14 bits as a float32: less than 2^-14 wide, relatively.
_DROPPED_BITS = 9
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class Distances:
    """Euclidean distances between tokens and what their indices stand for, percentiles within 2^-14 of theirs."""

    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, kw_only=True)
class StagesError:
    """What the first indices of a token leave.

    Attributes:
        num_quantizers: how many of them.
        mean_squared: mean of (decoded - latent)^2 over all elements.
        relative: that, of the latents' variance; None where they have none.
        snr_db: -10 log10(relative); None where nothing is left, or there is no variance.
    """

    num_quantizers: int
    mean_squared: float
    relative: float | None
    snr_db: float | None


@dataclass(frozen=True, kw_only=True)
class QuantizationError:
    """What all indices of a token leave.

    Attributes:
        compared: what was held against the codes, `Comparison.name`.
        variance: of what was compared, around each channel's own mean, over all elements.
        mean_squared, relative, snr_db: as in `StagesError`.
        distance: over tokens.
        by_stages: with fewer of a residual codebook's indices, and with all; empty for other kinds.
    """

    compared: str
    variance: float
    mean_squared: float
    relative: float | None
    snr_db: float | None
    distance: Distances
    by_stages: tuple[StagesError, ...]


class ErrorTally:
    """Sums over tokens, in float64."""

    def __init__(self, compared: str, stages: Sequence[int]) -> None:
        """Take what is compared, and the numbers of indices with which it is, ascending, the last of them all."""
        self._compared = compared
        self.stages = tuple(stages)
        self._squares = np.zeros(len(self.stages))
        self._elements = self._tokens = 0
        # Per channel: the mean, and the sum of squares around it.
        self._mean = self._around = np.zeros(())
        self.distances = Spread()

    def add(self, wanted: Tensor, found: Sequence[Tensor]) -> None:
        """Add tokens.

        Args:
            wanted: (n, width) float64.
            found: the same, with each of `stages`.
        """
        self._add_moments(wanted.cpu().numpy())
        self._elements += wanted.numel()
        squares = [(decoded - wanted).square().sum(dim=1) for decoded in found]
        self._squares += np.array([float(of_tokens.sum()) for of_tokens in squares])
        # With all indices.
        self.distances.add(squares[-1].sqrt().cpu().numpy())

    def error(self) -> QuantizationError:
        """Return the figures; there must be tokens."""
        variance = float(self._around.sum()) / self._elements
        stages = [
            self._stage(count, squares, variance) for count, squares in zip(self.stages, self._squares, strict=True)
        ]
        spread, whole = self.distances, stages[-1]
        return QuantizationError(
            compared=self._compared,
            variance=variance,
            mean_squared=whole.mean_squared,
            relative=whole.relative,
            snr_db=whole.snr_db,
            distance=Distances(
                p50=spread.percentile(50), p90=spread.percentile(90), p99=spread.percentile(99), max=spread.max
            ),
            by_stages=tuple(stages) if len(stages) > 1 else (),
        )

    def _stage(self, count: int, squares: float, variance: float) -> StagesError:
        mean_squared = float(squares) / self._elements
        relative = mean_squared / variance if variance > 0 else None
        snr_db = -10 * math.log10(relative) if relative else None
        return StagesError(num_quantizers=count, mean_squared=mean_squared, relative=relative, snr_db=snr_db)

    def _add_moments(self, rows: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> None:
        # A sum of squares less the square of a sum would cancel: Chan, Golub, LeVeque, "Updating formulae and a
        # pairwise algorithm for computing sample variances", 1979.
        total = self._tokens + len(rows)
        # Latents beyond 1e154 leave float64 here: the figures are then reported as none.
        with np.errstate(over="ignore", invalid="ignore"):
            mean = rows.mean(axis=0)
            step = mean - self._mean
            around = np.square(rows - mean).sum(axis=0)
            self._around = self._around + around + step**2 * (self._tokens * len(rows) / total)
            self._mean = self._mean + step * (len(rows) / total)
        self._tokens = total


def stages_to_compare(num_quantizers: int) -> list[int]:
    """Return 1, 2, 4 and so on, and all: decoding with each number of stages would take the square of their number."""
    powers = [1 << k for k in range(num_quantizers.bit_length()) if 1 << k < num_quantizers]
    return [*powers, num_quantizers]


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
