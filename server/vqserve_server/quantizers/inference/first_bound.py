"""What residual FSQ does to a channel before its first stage: a tanh, as the exact value rounded once to float32.

A channel z becomes f(z) = height t / (1 + skew t) with t = tanh(slope z). This form of tanh(z + shift) half - offset
loses no precision where f is near zero. For z other than zero f(z) is transcendental (Lindemann), so that it is never
half-way between two float32 numbers, and enough digits always decide how it is rounded.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqserve_server.quantizers.fsq_boundaries import half_and_offset
from vqserve_server.search.denormals import denormals_enabled, to_float64
from vqserve_server.search.quotients import round_fraction

# Beyond this number f differs from its limit by less than 1e-24. The limit is a fraction with a denominator of at most
# 2^16, so that it is a number of float32, or further than that from every number half-way between two of them.
_FLAT = 64.0
# More than float64 can be off by, divided by 1 - skew: tanh by 4 units in the last place, as the documentation of no
# device exceeds, and nine factors, products and the like by half of one each.
_RELATIVE_ERROR = 2.0**-48
_SAFE_FROM_FLUSHING = 2.0**-125
_DIGITS = 50


@dataclass(frozen=True)
class Curve:
    """f of one channel.

    Attributes:
        height: positive.
        slope: positive.
        skew: in [0, 1).
    """

    height: Fraction
    slope: Fraction
    skew: Fraction

    @classmethod
    def of_fsq(cls, levels: int) -> Self:
        """Return the curve tanh(z + atanh(offset / half)) half - offset, as `fsq_boundaries.boundaries` has them."""
        half, offset = half_and_offset(levels, "atanh")
        skew = offset / half
        return cls(half * (1 - skew * skew), Fraction(1), skew)

    @classmethod
    def of_soft_clamp(cls, levels: int) -> Self:
        """Return the curve tanh(z / c) c with c = 1 + 1 / (L - 1)."""
        limit = Fraction(levels, levels - 1)
        return cls(limit, 1 / limit, Fraction(0))


@dataclass(frozen=True, eq=False)
class FirstBound:
    """f of all channels. It is made by `of`."""

    _curves: tuple[Curve, ...]
    # (D,) float64 each.
    _height: Tensor
    _slope: Tensor
    _skew: Tensor
    _error: Tensor

    @classmethod
    def of(cls, curves: Sequence[Curve], device: torch.device) -> Self:
        """Return the bound of D channels on a device."""
        columns = [
            (float(curve.height), float(curve.slope), float(curve.skew), _RELATIVE_ERROR / float(1 - curve.skew))
            for curve in curves
        ]
        return cls(tuple(curves), *torch.tensor(columns, dtype=torch.float64, device=device).unbind(dim=1))

    @denormals_enabled()
    def __call__(self, rows: Tensor) -> Tensor:
        """Return f of rows (n, D) float32 or float64: float32, each the exact value rounded once; zero is +0.0."""
        # The same result, and few different numbers where many are large.
        numbers = to_float64(rows).clamp(-_FLAT, _FLAT)
        t = torch.tanh(numbers * self._slope)
        values = self._height * t / (1.0 + self._skew * t)
        error = self._error * values.abs()
        below, above = (values - error).to(torch.float32), (values + error).to(torch.float32)
        out = values.to(torch.float32) + 0.0
        # torch's threads may flush denormals.
        is_open = ~(below == above) | ((values.abs() < _SAFE_FROM_FLUSHING) & (numbers != 0))
        if bool(is_open.any()):
            out[is_open] = torch.from_numpy(self._settle(numbers, is_open)).to(out.device)
        return out

    def _settle(self, numbers: Tensor, where: Tensor) -> npt.NDArray[np.float32]:
        channels = torch.nonzero(where)[:, 1].tolist()
        wanted = zip(numbers[where].tolist(), channels, strict=True)
        return np.array([_rounded(number, self._curves[channel]) for number, channel in wanted], np.float32) + 0.0


# The same numbers come again: few of float32 are open.
@functools.lru_cache(maxsize=1 << 16)
def _rounded(number: float, curve: Curve) -> np.float32:
    """Return f of a number rounded once to float32."""
    if number == 0:
        return np.float32(0.0)
    digits = _DIGITS
    while True:
        value = _value(number, curve, digits)
        # The exponent's size, at most 2 * _FLAT, and its roundings are what t is off by; the rest is f's slope.
        doubt = curve.height * Fraction(10) ** (3 - digits) / (1 - curve.skew) ** 2
        below, above = round_fraction(value - doubt), round_fraction(value + doubt)
        if below == above:
            return below
        digits *= 2


def _value(number: float, curve: Curve, digits: int) -> Fraction:
    with localcontext(Context(prec=digits)):
        exponent = 2 * Decimal(number) * Decimal(curve.slope.numerator) / Decimal(curve.slope.denominator)
        power = exponent.exp()
        t = Fraction((power - 1) / (power + 1))
    return curve.height * t / (1 + curve.skew * t)
