"""Oracles that share nothing with what they judge: rationals, and mpmath where there are none."""

from __future__ import annotations

from fractions import Fraction

import mpmath
import numpy as np

mpmath.mp.dps = 80


def round32(value: mpmath.mpf | Fraction) -> np.float32:
    """Return the float32 nearest to a number, to even at a tie; the number is within float32's range."""
    exact = mpmath.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value
    guess = np.float32(float(exact))
    near = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(near, key=lambda x: (abs(mpmath.mpf(float(x)) - exact), int(x.view(np.uint32)) & 1)) + np.float32(0)


def unit_row(row: list[float], least: float = 0.0) -> list[float]:
    """Return a row / its length, or the least length, each element rounded once to float32; zeros stay zeros."""
    length = max(mpmath.sqrt(mpmath.fsum(mpmath.mpf(x) ** 2 for x in row)), mpmath.mpf(least))
    return [float(round32(mpmath.mpf(x) / length)) if length else 0.0 for x in row]


def affine(row: list[float], weight: list[list[float]], bias: list[float]) -> list[float]:
    """Return weight @ row + bias, each element rounded once to float32."""
    return [float(round32(_dot(row, line) + Fraction(b))) for line, b in zip(weight, bias, strict=True)]


def nearest(row: list[float], codes: list[list[float]]) -> int:
    """Return the lowest index of the code at the least distance."""
    return _first_of_least(
        [sum((Fraction(x) - Fraction(a)) ** 2 for x, a in zip(row, code, strict=True)) for code in codes]
    )


def greatest(row: list[float], codes: list[list[float]]) -> int:
    """Return the lowest index of the code of the greatest dot product."""
    return _first_of_least([-_dot(row, code) for code in codes])


def _dot(x: list[float], y: list[float]) -> Fraction:
    return sum((Fraction(a) * Fraction(b) for a, b in zip(x, y, strict=True)), Fraction(0))


def _first_of_least(costs: list[Fraction]) -> int:
    return min(range(len(costs)), key=lambda j: (costs[j], j))
