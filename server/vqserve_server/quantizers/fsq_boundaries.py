"""The boundaries between the digits of finite scalar quantization: real numbers, rounded down to float64.

FSQ rounds tanh(z + shift) half - offset. tanh rises, so that the rounded value reaches a digit exactly where z passes
one number t = atanh(p) - shift, p rational. No floating-point z but zero equals a t: with shift = 0 or atanh(q) it is
half the logarithm of a rational, which is transcendental (Lindemann), and with shift = tan(q) the
search for t below ends only if t is no float64. So z > t exactly if z is greater than t rounded down to float64, and
the device computes only this comparison. Without a tanh, t is rational, and z reaches the digit at t itself: then t is
replaced by the greatest float64 number below it.

A stage of residual FSQ rounds the residual divided by a scale 1/d, d an integer: the same comparison with t/d.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Bound = Literal["atanh", "tan", "symmetric"]

StageBound = Literal[Bound, "clamp"]

Threshold: TypeAlias = Fraction | float | Callable[[int], Decimal]
"""A number that a channel must reach (a rational), or pass: infinite, or given with so many digits."""

# Of `half`, below.
EPS = Fraction(1, 1000)
_DIGITS = 50


def boundaries(levels: int, bound: StageBound) -> npt.NDArray[np.float64]:
    """Return the (L - 1,) numbers that a channel must exceed for the digits 1, 2, ..., L - 1.

    Args:
        levels: L, at least 2.
        bound: what is rounded to the nearest integer, L // 2 less than the digit: tanh(z + shift) half - offset, with
            offset = 1/2 for even L, 0 for odd, eps = 1/1000, and
            "atanh": half = (L - 1)(1 + eps) / 2, shift = atanh(offset / half);
            "tan": half = (L - 1)(1 - eps) / 2, shift = tan(offset / half).
            Or "symmetric": the digit is (L - 1)(tanh(z) + 1) / 2 + 1/2, rounded down; "clamp": the same with z limited
            to [-1, 1] in place of its tanh.

    Returns:
        Ascending; infinite where the bounded value never reaches a digit, or never falls below it.
    """
    of_one_stage: npt.NDArray[np.float64] = stage_boundaries(levels, bound, (1,))[0]
    return of_one_stage


@functools.cache
def stage_boundaries(levels: int, bound: StageBound, divisors: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Return the boundaries (stages, L - 1) of channels that were not yet multiplied by the stages' divisors.

    Args:
        levels: see `boundaries`.
        bound: see `boundaries`.
        divisors: d of every stage, positive: its digit is that of d times the channel.
    """
    of_digits = [[_rounded_down(t, divisor) for divisor in divisors] for t in _thresholds(levels, bound)]
    return np.array(of_digits).T


def half_and_offset(levels: int, bound: StageBound) -> tuple[Fraction, Fraction]:
    """Return half and offset of the bounds "atanh" and "tan"."""
    return (levels - 1) * (1 + EPS if bound == "atanh" else 1 - EPS) / 2, Fraction(1 - levels % 2, 2)


def _thresholds(levels: int, bound: StageBound) -> Iterator[Threshold]:
    digits = range(1, levels)
    if bound in ("symmetric", "clamp"):
        values = (Fraction(2 * digit - levels, levels - 1) for digit in digits)
        # atanh(0) is the one rational among the others.
        yield from (value if bound == "clamp" or value == 0 else _atanh(value) for value in values)
        return
    half, offset = half_and_offset(levels, bound)
    shift = _atanh(offset / half) if bound == "atanh" else _tan(offset / half)
    for digit in digits:
        yield _passed((digit - levels // 2 - Fraction(1, 2) + offset) / half, shift)


def _passed(p: Fraction, shift: Callable[[int], Decimal]) -> Threshold:
    if abs(p) >= 1:
        return math.copysign(math.inf, p)
    return functools.cache(lambda digits: _atanh(p)(digits) - shift(digits))


def _rounded_down(threshold: Threshold, divisor: int) -> float:
    """Return the greatest float64 below a threshold divided by a divisor."""
    if isinstance(threshold, float):
        return threshold
    if isinstance(threshold, Fraction):
        exact = threshold / divisor
        nearest = float(exact)
        return nearest if Fraction(nearest) < exact else math.nextafter(nearest, -math.inf)
    digits = _DIGITS
    while True:
        # Some hundred roundings at most, of numbers below a hundred.
        doubt = Decimal(10) ** (5 - digits) / divisor
        with localcontext(Context(prec=2 * digits)):
            t = threshold(digits) / divisor
            nearest = float(t)
            gap = Decimal(nearest) - t
        if abs(gap) > 2 * doubt:
            return nearest if gap < 0 else math.nextafter(nearest, -math.inf)
        digits *= 2


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
