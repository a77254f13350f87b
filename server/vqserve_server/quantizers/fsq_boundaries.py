"""The boundaries between the digits of finite scalar quantization: real numbers, rounded down to float64.

FSQ rounds tanh(z + shift) half - offset. tanh rises, so that the rounded value reaches a digit exactly where z passes
one number t = atanh(p) - shift, p rational. No floating-point z but zero equals a t: with shift = 0 or atanh(q) it is
half the logarithm of a rational, which is transcendental (Lindemann), and with shift = tan(q) the
search for t below ends only if t is no float64. So z > t exactly if z is greater than t rounded down to float64, and
the device computes only this comparison.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt

Bound = Literal["atanh", "tan", "symmetric"]

# Of `half`, below.
EPS = Fraction(1, 1000)
_DIGITS = 50


@functools.cache
def boundaries(levels: int, bound: Bound) -> npt.NDArray[np.float64]:
    """Return the (L - 1,) numbers that a channel must exceed for the digits 1, 2, ..., L - 1.

    Args:
        levels: L, at least 2.
        bound: what is rounded to the nearest integer, L // 2 less than the digit: tanh(z + shift) half - offset, with
            offset = 1/2 for even L, 0 for odd, eps = 1/1000, and
            "atanh": half = (L - 1)(1 + eps) / 2, shift = atanh(offset / half);
            "tan": half = (L - 1)(1 - eps) / 2, shift = tan(offset / half).
            Or "symmetric": the digit is (L - 1)(tanh(z) + 1) / 2 + 1/2, rounded down.

    Returns:
        Ascending; infinite where the bounded value never reaches a digit, or never falls below it.
    """
    if bound == "symmetric":
        return np.array([_reached(Fraction(2 * digit - levels, levels - 1), _zero) for digit in range(1, levels)])
    half = (levels - 1) * (1 + EPS if bound == "atanh" else 1 - EPS) / 2
    offset = Fraction(1 - levels % 2, 2)
    shift = _atanh(offset / half) if bound == "atanh" else _tan(offset / half)
    middles = ((digit - levels // 2 - Fraction(1, 2) + offset) / half for digit in range(1, levels))
    return np.array([_reached(middle, shift) for middle in middles])


def _reached(p: Fraction, shift: Callable[[int], Decimal]) -> float:
    if abs(p) >= 1:
        return math.copysign(math.inf, p)
    if p == 0 and shift is _zero:
        # The one jump at a number that there is: zero itself is above it.
        return -math.ulp(0.0)
    return _rounded_down(lambda digits: _atanh(p)(digits) - shift(digits))


def _rounded_down(value: Callable[[int], Decimal]) -> float:
    """Return the greatest float64 below a number; `value(digits)` is the number to that many digits."""
    digits = _DIGITS
    while True:
        # Some hundred roundings at most, of numbers below a hundred.
        t, doubt = value(digits), Decimal(10) ** (5 - digits)
        nearest = float(t)
        with localcontext(Context(prec=2 * digits)):
            gap = Decimal(nearest) - t
        if abs(gap) > doubt:
            return nearest if gap < 0 else math.nextafter(nearest, -math.inf)
        digits *= 2


def _zero(_: int) -> Decimal:
    return Decimal(0)


def _atanh(p: Fraction) -> Callable[[int], Decimal]:
    def value(digits: int) -> Decimal:
        ratio = (1 + p) / (1 - p)
        with localcontext(Context(prec=digits)):
            return (Decimal(ratio.numerator) / Decimal(ratio.denominator)).ln() / 2

    return functools.cache(value)


def _tan(x: Fraction) -> Callable[[int], Decimal]:
    def value(digits: int) -> Decimal:
        with localcontext(Context(prec=digits)):
            angle = Decimal(x.numerator) / Decimal(x.denominator)
            return _series(angle, angle, 1, digits) / _series(angle, Decimal(1), 0, digits)

    return functools.cache(value)


def _series(x: Decimal, term: Decimal, power: int, digits: int) -> Decimal:
    """Return Taylor's series of sine or cosine for |x| < 2, from its first term on."""
    total = Decimal(0)
    while term and term.adjusted() > -digits:
        total += term
        term *= -x * x / ((power + 1) * (power + 2))
        power += 2
    return total
