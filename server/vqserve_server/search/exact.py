"""Near-ties: decides in exact arithmetic which of a few candidate codes wins a row.

A backend's fast pass cannot decide some rows; for each of them it lists the codes that could still win within the error
bound. Their scores are computed in twice float64's precision, and for rows that are still undecided with rationals.

`sum_of_products` uses the error-free transformations of Knuth (two_sum) and Dekker (two_product) as in Ogita, Rump,
Oishi, "Accurate sum and dot product", SIAM J. Sci. Comput. 26 (2005), with a running error bound added: where it is
zero the result is exact.
"""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from vqserve_server.search.searcher import Objective

if TYPE_CHECKING:
    from torch import Tensor

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Elements of one chunk of the (pairs, terms) arrays: a few MiB.
_ELEMENTS_PER_CHUNK = 1 << 18
# Two normalised expansions whose relative difference is above this compare as their parts do.
_EXPANSION_ROUNDING = 2.0**-100
_SPLITTER = float(2**27 + 1)
# The error of a smaller product may itself underflow; Dekker's splitting of a larger factor may overflow.
_SMALLEST_SAFE_PRODUCT = 2.0**-960
_LARGEST_SAFE_FACTOR = 2.0**990


class Expansion(NamedTuple):
    """Numbers hi + lo with |exact - (hi + lo)| <= error; hi is the float64 number nearest to hi + lo."""

    hi: Floats
    lo: Floats
    error: Floats


def two_sum(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """Return s and e with s = fl(a + b) and s + e = a + b exactly."""
    s = a + b
    v = s - a
    return s, (a - (s - v)) + (b - v)


def _split(a: Floats) -> tuple[Floats, Floats]:
    c = _SPLITTER * a
    hi = c - (c - a)
    return hi, a - hi


def two_product(a: Floats, b: Floats) -> tuple[Floats, Floats, Floats]:
    """Return p = fl(a * b), e and a bound. Where the bound is 0, p + e = a * b exactly; elsewhere it is infinite."""
    p = a * b
    a_hi, a_lo = _split(a)
    b_hi, b_lo = _split(b)
    e = ((a_hi * b_hi - p) + a_hi * b_lo + a_lo * b_hi) + a_lo * b_lo
    unsafe = (np.abs(p) < _SMALLEST_SAFE_PRODUCT) & (a != 0) & (b != 0)
    unsafe |= np.maximum(np.abs(a), np.abs(b)) > _LARGEST_SAFE_FACTOR
    unsafe |= ~np.isfinite(e)
    return p, np.where(unsafe, 0.0, e), np.where(unsafe, np.inf, 0.0)


def sum_of_products(x: Floats, y: Floats, *, exact_products: bool) -> Expansion:
    """Return sum_k x[:, k] * y[:, k].

    Args:
        x: (m, t) float64, finite.
        y: (m, t) float64, finite.
        exact_products: whether every product is exact in float64, as products of float32 numbers are.
    """
    high = np.zeros(x.shape[0])
    low = np.zeros(x.shape[0])
    error = np.zeros(x.shape[0])
    # A number that overflows gets an infinite error bound, so numpy's warning adds nothing.
    with np.errstate(all="ignore"):
        for k in range(x.shape[1]):
            if exact_products:
                product = x[:, k] * y[:, k]
                terms = []
            else:
                product, rest, bound = two_product(x[:, k], y[:, k])
                error += bound
                terms = [rest]
            high, rounding = two_sum(high, product)
            for term in (*terms, rounding):
                low, lost = two_sum(low, term)
                error += np.abs(lost)
        # The bound itself is a sum of t to 2t rounded terms; one part in 2^40 is far more than its rounding error.
        error *= 1.0 + 2.0**-40
        hi, lo = two_sum(high, low)
        error = np.where(np.isfinite(hi) & np.isfinite(lo), error, np.inf)
    return Expansion(hi, lo, error)


class Arbiter:
    """Computes scores of (row, code) pairs beyond float64's precision, on the CPU."""

    def __init__(self, codes: Tensor, bias: Tensor | None, objective: Objective) -> None:
        """Copy a codebook to the CPU: codes (K, D) and, for DOT, bias (K,), float32 or float64 on any device."""
        self._codes = codes.detach().cpu().numpy()
        self._bias = None if bias is None else bias.detach().cpu().numpy()
        self._objective = objective

    def settle(self, rows: npt.NDArray[np.floating], pair_row: Ints, pair_code: Ints) -> Ints:
        """Return the winner of every row among its candidates.

        Args:
            rows: (r, D) float32 or float64, finite.
            pair_row: (p,) ascending positions in `rows`; every row has at least one pair.
            pair_code: (p,) a candidate code of that row; the candidates of a row include every code that could win.

        Returns:
            (r,) winning codes, the lowest among equals.
        """
        score = self._score(rows, pair_row, pair_code)
        # Best first within each row; the lowest code first among equal expansions.
        order = np.lexsort((pair_code, -score.lo, -score.hi, pair_row))
        hi, lo, error = score.hi[order], score.lo[order], score.error[order]
        row, code = pair_row[order], pair_code[order]
        first = np.searchsorted(row, np.arange(rows.shape[0]))
        winners = code[first]

        best = first[row]
        with np.errstate(invalid="ignore", over="ignore"):
            gap = (hi[best] - hi) + (lo[best] - lo)
            doubt = error[best] + error + np.abs(hi[best]) * _EXPANSION_ROUNDING
        # Negated, so that NaN (an overflow) counts as within.
        within = ~(gap > doubt)
        proven_equal = (hi == hi[best]) & (lo == lo[best]) & (error == 0) & (error[best] == 0)
        for r in np.unique(row[within & ~proven_equal]):
            own = slice(first[r], first[r + 1] if r + 1 < first.size else None)
            contenders = code[own][within[own]]
            winners[r] = min(contenders.tolist(), key=partial(self._rank, rows[r]))
        return winners

    def _rank(self, z: npt.NDArray[np.floating], code: int) -> tuple[Fraction, int]:
        return -self._exact_score(z, code), code

    def _score(self, rows: npt.NDArray[np.floating], pair_row: Ints, pair_code: Ints) -> Expansion:
        exact_products = rows.dtype == np.float32 and self._codes.dtype == np.float32
        step = max(1, _ELEMENTS_PER_CHUNK // (2 * self._codes.shape[1]))
        parts = []
        for start in range(0, pair_row.size, step):
            chunk = slice(start, start + step)
            x, y = self._factors(rows[pair_row[chunk]], pair_code[chunk])
            parts.append(sum_of_products(x, y, exact_products=exact_products))
        return Expansion(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    def _factors(self, z: npt.NDArray[np.floating], codes: Ints) -> tuple[Floats, Floats]:
        """Return x and y with score = sum(x * y): z.a - a.a/2, or z.a + b.1."""
        x: Floats = z.astype(np.float64)
        a: Floats = self._codes[codes].astype(np.float64)
        if self._objective is Objective.L2:
            return np.concatenate([x, -0.5 * a], axis=1), np.concatenate([a, a], axis=1)
        if self._bias is None:
            return x, a
        return np.column_stack([x, self._bias[codes]]), np.column_stack([a, np.ones(codes.size)])

    def _exact_score(self, z: npt.NDArray[np.floating], code: int) -> Fraction:
        pairs = zip(z.tolist(), self._codes[code].tolist(), strict=True)
        if self._objective is Objective.L2:
            return sum((Fraction(x) * Fraction(a) - Fraction(a) ** 2 / 2 for x, a in pairs), Fraction(0))
        bias = 0.0 if self._bias is None else float(self._bias[code])
        return sum((Fraction(x) * Fraction(a) for x, a in pairs), Fraction(bias))
