"""Quantization error of tokens, and percentiles of many values in a fixed amount of memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Floats = npt.NDArray[np.float64]

# A bin holds the values with equal sign, exponent and leading 14 bits as float32: its relative width is below 2^-14.
_DROPPED_BITS = 9
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class Distances:
    """Euclidean distances between tokens and their decoded values; percentiles have a relative error below 2^-14."""

    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, kw_only=True)
class StagesError:
    """Quantization error with only the first indices of each token.

    Attributes:
        num_quantizers: number of indices used.
        mean_squared: mean of (decoded - latent)^2 over all elements.
        relative: mean_squared divided by the variance of the latents; None if the variance is zero.
        snr_db: -10 log10(relative); None if the error or the variance is zero.
    """

    num_quantizers: int
    mean_squared: float
    relative: float | None
    snr_db: float | None


@dataclass(frozen=True, kw_only=True)
class QuantizationError:
    """Quantization error with all indices of each token.

    Attributes:
        compared: what the codes were compared with, `Comparison.name`.
        variance: variance of the compared values around the mean of their channel, over all elements.
        mean_squared, relative, snr_db: as in `StagesError`.
        distance: distances of the tokens.
        by_stages: errors with some and with all indices of a residual codebook; empty for other kinds.
    """

    compared: str
    variance: float
    mean_squared: float
    relative: float | None
    snr_db: float | None
    distance: Distances
    by_stages: tuple[StagesError, ...]


class ErrorTally:
    """Accumulates the quantization error of tokens, in float64."""

    def __init__(self, compared: str, stages: Sequence[int]) -> None:
        """Start with no tokens.

        Args:
            compared: what the codes are compared with, `Comparison.name`.
            stages: numbers of indices to decode with, ascending; the last is the number of all indices.
        """
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
            wanted: (n, width) float64, the exact values.
            found: for each number of `stages`, the decoded values, (n, width) float64.
        """
        self._add_moments(wanted.cpu().numpy())
        self._elements += wanted.numel()
        squares = [(decoded - wanted).square().sum(dim=1) for decoded in found]
        self._squares += np.array([float(of_tokens.sum()) for of_tokens in squares])
        # The last entry is the error with all indices.
        self.distances.add(squares[-1].sqrt().cpu().numpy())

    def error(self) -> QuantizationError:
        """Return the error of all tokens; there must be at least one."""
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
        # The difference of a sum of squares and a squared sum would cancel. Source: Chan, Golub, LeVeque, "Updating
        # formulae and a pairwise algorithm for computing sample variances", 1979.
        total = self._tokens + len(rows)
        # The squares of latents above 1e154 overflow float64; the report then has no such figure.
        with np.errstate(over="ignore", invalid="ignore"):
            mean = rows.mean(axis=0)
            step = mean - self._mean
            around = np.square(rows - mean).sum(axis=0)
            self._around = self._around + around + step**2 * (self._tokens * len(rows) / total)
            self._mean = self._mean + step * (len(rows) / total)
        self._tokens = total


def stages_to_compare(num_quantizers: int) -> list[int]:
    """Return 1, 2, 4 and so on, and the number of all stages: decoding with every number would take quadratic time."""
    powers = [1 << k for k in range(num_quantizers.bit_length()) if 1 << k < num_quantizers]
    return [*powers, num_quantizers]


class Spread:
    """Histogram of values that are not negative, with about four million bins."""

    def __init__(self) -> None:
        self._counts = np.zeros(1 << (31 - _DROPPED_BITS), np.int64)
        self.max = 0.0

    def add(self, values: Floats) -> None:
        """Count values (n,); values beyond float32's range count as its largest number."""
        if values.size:
            self.max = max(self.max, float(values.max()))
            bits = np.minimum(values, _LARGEST).astype(np.float32).view(np.uint32)
            bins, counts = np.unique(bits >> _DROPPED_BITS, return_counts=True)
            self._counts[bins] += counts

    def percentile(self, percent: float) -> float:
        """Return a percentile, with a relative error below 2^-14; there must be at least one value."""
        up_to = np.cumsum(self._counts)
        place = np.searchsorted(up_to, max(1, math.ceil(percent / 100 * int(up_to[-1]))))
        return min(self.max, float(_middles(np.array([place]))[0]))

    def values_and_counts(self) -> tuple[Floats, npt.NDArray[np.int64]]:
        """Return, ascending, a value for each bin that is not empty, and its number of values."""
        places = np.nonzero(self._counts)[0]
        return _middles(places), self._counts[places]


def _middles(bins: npt.NDArray[np.int64]) -> Floats:
    bits = (bins.astype(np.uint32) << _DROPPED_BITS) + np.uint32(1 << (_DROPPED_BITS - 1))
    # The first bin holds zero.
    return np.where(bins == 0, 0.0, bits.view(np.float32).astype(np.float64))
