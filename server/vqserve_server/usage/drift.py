"""How far the use of codes in live traffic is from a reference: Jensen-Shannon divergence, corrected for chance.

Two samples of one distribution never agree: with K codes their divergence is about (K - 1) / (8 ln 2) (1 / n + 1 / m)
bits for large samples of n and m rows, and close to 1 bit where there are more codes than rows. So the divergence that
chance alone gives is computed and taken off. It is exact whatever the distribution is: if both samples are of one
distribution, then, given how often the two together have each code (t), the number of them that belongs to the first
sample is hypergeometric. Subtracting the mean over it is what the adjusted mutual information does (Vinh, Epps, Bailey,
"Information theoretic measures for clusterings comparison", JMLR 11, 2010).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.integer[Any]]

# Fewer rows tell nothing, and the expansion for codes that occur often is not meant for them.
LEAST_ROWS = 1000
# A drift is known if chance seldom moves it by more than three times this.
MOST_NOISE_BITS = 0.01
# And if chance takes less than this: where it takes most of the divergence, a drift looks much smaller than it is.
MOST_CHANCE_BITS = 0.25
# Where the smaller sample has more rows of a code on average, four terms of a series replace the exact sum.
_EXACT_UP_TO = 64.0
# More rows than this have a probability below 1e-20 where the mean is _EXACT_UP_TO.
_MOST_ROWS_SUMMED = 192
# The moments are smooth in t: they are computed for so many values of t, and interpolated.
_NODES = 256
_MOST_COUNTED = 1 << 20


@dataclass(frozen=True)
class Drift:
    """A divergence between two samples.

    Attributes:
        bits: the Jensen-Shannon divergence of their distributions, estimated: 0 if they are the same, 1 if they have no
            code in common.
        chance_bits: mean of the uncorrected divergence between two samples of these sizes of one distribution.
        noise_bits: standard deviation of `bits` between such samples.
    """

    bits: float
    chance_bits: float
    noise_bits: float

    @property
    def is_known(self) -> bool:
        """Whether the samples are large enough to tell a drift from chance: about as many rows as codes in use."""
        return self.noise_bits <= MOST_NOISE_BITS and self.chance_bits <= MOST_CHANCE_BITS


def measure_drift(live: Counts, reference: Counts) -> Drift | None:
    """Return the drift between two samples; None if one has fewer than `LEAST_ROWS` rows.

    Args:
        live: (C,) rows of each code in one sample.
        reference: (C,) rows of each code in the other.
    """
    # The divergence is symmetric, and the moments are those of the smaller sample.
    small, large = sorted((live, reference), key=lambda counts: int(counts.sum()))
    n, m = int(small.sum()), int(large.sum())
    if n < LEAST_ROWS:
        return None
    totals = small.astype(np.int64) + large
    occurs = totals > 0
    found = float(_divergence(small[occurs] / n, large[occurs] / m).sum())
    chance, noise = _by_chance(totals[occurs], n, m)
    if chance >= 1.0:
        return None
    bits = (found - chance) / (1.0 - chance)
    return Drift(bits=min(max(bits, 0.0), 1.0), chance_bits=chance, noise_bits=noise / (1.0 - chance))


def _divergence(p: Floats, q: Floats) -> Floats:
    """Return what each code adds to the divergence, in bits, of its probabilities in two distributions."""
    middle = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        left = np.where(p > 0, p * np.log2(p / middle), 0.0)
        right = np.where(q > 0, q * np.log2(q / middle), 0.0)
    return (left + right) / 2


def _by_chance(totals: npt.NDArray[np.int64], n: int, m: int) -> tuple[float, float]:
    """Return mean and standard deviation of the divergence if the rows are dealt out at random.

    Args:
        totals: (C,) rows of each code in both samples, at least one.
        n: rows of the smaller sample.
        m: rows of the larger one.
    """
    values, codes = _distinct(totals)
    nodes = values
    if values.size > _NODES:
        nodes = np.unique(np.geomspace(values[0], values[-1], _NODES).round())
    moments = _moments(nodes, n, m)
    if nodes is not values:
        moments = np.stack([np.interp(np.log(values), np.log(nodes), moment) for moment in moments])
    mean, variance, covariance, spread = (moments * codes).sum(axis=1)
    # The codes share n rows: what follows from their number alone does not vary (Morris, "Central limit theorems for
    # multinomial sums", 1975).
    left = variance - covariance**2 / spread if spread > 0 else variance
    return float(mean), math.sqrt(max(float(left), 0.0))


def _distinct(totals: npt.NDArray[np.int64]) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Return the values that occur, ascending, and how often."""
    if int(totals.max()) < _MOST_COUNTED:
        # Faster than to sort them.
        codes = np.bincount(totals)
        values = np.flatnonzero(codes)
        return values.astype(np.float64), codes[values]
    distinct, counts = np.unique(totals, return_counts=True)
    return distinct.astype(np.float64), counts


def _moments(totals: Floats, n: int, m: int) -> Floats:
    """Return moments (4, T) of a code that both samples together have `totals` (T,) times.

    They are the mean and the variance of what the code adds to the divergence, its covariance with the number of rows
    in the smaller sample, and the variance of that number.
    """
    moments = np.empty((4, totals.size))
    is_exact = totals * (n / (n + m)) <= _EXACT_UP_TO
    moments[:, is_exact] = _summed(totals[is_exact], n, m)
    moments[:, ~is_exact] = _expanded(totals[~is_exact], n, m)
    return moments


def _summed(totals: Floats, n: int, m: int) -> Floats:
    t = totals[:, None]
    x = np.arange(min(_MOST_ROWS_SUMMED, n, int(totals.max(initial=0))) + 1, dtype=np.float64)
    # Hypergeometric probabilities, from the quotients of neighbours.
    with np.errstate(divide="ignore"):
        ratios = np.log(np.maximum(t - x[:-1], 0.0) * (n - x[:-1]) / (x[1:] * (m - t + x[1:])))
    logarithms = np.concatenate([np.zeros((totals.size, 1)), np.cumsum(ratios, axis=1)], axis=1)
    weights = np.exp(logarithms - logarithms.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    added = _divergence(x / n, np.maximum(t - x, 0.0) / m)
    mean, mean_x = (weights * added).sum(axis=1), (weights * x).sum(axis=1)
    off, off_x = added - mean[:, None], x - mean_x[:, None]
    return np.stack([mean, *((weights * one).sum(axis=1) for one in (off**2, off * off_x, off_x**2))])


def _expanded(totals: Floats, n: int, m: int) -> Floats:
    # With x = t a + d and y = t b - d the code adds t / (2 N ln 2) (A2 d^2 + A3 d^3 + A4 d^4 + ...).
    rows = n + m
    a, b = n / rows, m / rows
    i, j = 1 / (totals * a), -1 / (totals * b)
    middle = (i + j) / 2
    a2 = (i - j) ** 2 / 4
    a3 = middle**3 / 3 - (i**3 + j**3) / 6
    a4 = (i**4 + j**4) / 12 - middle**4 / 6
    rest = (rows - totals) / (rows - 1)
    d2 = totals * a * b * rest
    d3 = d2 * (b - a) * (rows - 2 * totals) / (rows - 2)
    d4 = 3 * d2**2
    unit = totals / (2 * rows * math.log(2))
    return np.stack([unit * (a2 * d2 + a3 * d3 + a4 * d4), 2 * (unit * a2 * d2) ** 2, unit * (a2 * d3 + a3 * d4), d2])
