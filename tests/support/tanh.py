"""tanh between two rationals, by integers only."""

from __future__ import annotations

from fractions import Fraction

_BITS = 500
_HALVINGS = 40


def tanh_between(x: Fraction) -> tuple[Fraction, Fraction]:
    """Return two rationals with tanh(x) between them, less than 2^-390 apart and of its sign; both 0 for 0."""
    if abs(x) < Fraction(1, 1 << 130):
        # |x| - |x|^3 / 3 < |tanh(x)| <= |x|
        return x - x**3, x
    if abs(x) > 400:
        near = 1 - Fraction(1, 1 << 400)
        return (near, Fraction(1)) if x > 0 else (Fraction(-1), -near)
    # exp(2x) = exp(2x / 2^40)^(2^40) by Taylor's series of integers, in units of 2^-bits.
    bits = _BITS + 800 + 2 * _HALVINGS
    one = 1 << bits
    step = round(2 * x * one) >> _HALVINGS
    power, term, number = one, one, 1
    while term not in (0, -1):
        term = (term * step >> bits) // number
        power += term
        number += 1
    for _ in range(_HALVINGS):
        power = power * power >> bits
    value, error = Fraction(power - one, power + one), Fraction(1, 1 << _BITS)
    return value - error, value + error
