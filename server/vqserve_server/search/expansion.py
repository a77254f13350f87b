"""Sums of products in twice float64's precision, with a bound on what is still missing.

The error-free transformations of Knuth (two_sum) and Dekker (two_product) as in Ogita, Rump, Oishi, "Accurate sum and
dot product", SIAM J. Sci. Comput. 26 (2005), with a running error bound added: where it is zero the result is exact.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_SPLITTER = float(2**27 + 1)
# Below this, the error of a product may itself underflow; above, Dekker's splitting may overflow.
_SMALLEST_SAFE_PRODUCT = 2.0**-960
_LARGEST_SAFE_FACTOR = 2.0**990


class Expansion(NamedTuple):
    """Numbers hi + lo with |exact - (hi + lo)| <= error; hi is the float64 nearest to hi + lo."""

    hi: Array
    lo: Array
    error: Array


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Return s and e with s = fl(a + b) and s + e = a + b exactly."""
    s = a + b
    v = s - a
    return s, (a - (s - v)) + (b - v)


def _split(a: Array) -> tuple[Array, Array]:
    c = _SPLITTER * a
    hi = c - (c - a)
    return hi, a - hi


def two_product(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """Return p, e and a bound: p = fl(a * b), and p + e = a * b where the bound is 0; elsewhere it is infinite."""
    p = a * b
    a_hi, a_lo = _split(a)
    b_hi, b_lo = _split(b)
    e = ((a_hi * b_hi - p) + a_hi * b_lo + a_lo * b_hi) + a_lo * b_lo
    unsafe = (np.abs(p) < _SMALLEST_SAFE_PRODUCT) & (a != 0) & (b != 0)
    unsafe |= np.maximum(np.abs(a), np.abs(b)) > _LARGEST_SAFE_FACTOR
    unsafe |= ~np.isfinite(e)
    return p, np.where(unsafe, 0.0, e), np.where(unsafe, np.inf, 0.0)


def sum_of_products(x: Array, y: Array, *, exact_products: bool) -> Expansion:
    """Return sum_k x[:, k] * y[:, k].

    Args:
        x: (m, t) float64, finite.
        y: (m, t) float64, finite.
        exact_products: whether every product is exact in float64, as those of widened float32 numbers are.
    """
    high = np.zeros(x.shape[0])
    low = np.zeros(x.shape[0])
    error = np.zeros(x.shape[0])
    # What overflows has an infinite error bound: a warning would say no more.
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
        # The bound is a sum of t..2t rounded terms: one part in 2^40 is far more than its own rounding.
        error *= 1.0 + 2.0**-40
        hi, lo = two_sum(high, low)
        error = np.where(np.isfinite(hi) & np.isfinite(lo), error, np.inf)
    return Expansion(hi, lo, error)
