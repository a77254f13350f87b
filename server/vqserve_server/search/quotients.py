"""Quotients by norms, in numpy, and the rounding of exact numbers: values that are rounded once to float32.

Each element is computed in float64 first. If its error interval contains a rounding boundary, the element is computed
again with rationals. `rounding` has the same for tensors.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from vqserve_server.search.bounds import gamma
from vqserve_server.search.denormals import denormals_enabled

Floats = npt.NDArray[np.floating]
Float64s = npt.NDArray[np.float64]
Float32s = npt.NDArray[np.float32]

_ABOVE_FLOAT32 = np.float64(2.0**128)
# A sum of squares between these did not overflow, and no square that matters underflowed.
_SAFE_SQUARES = (2.0**-900, 2.0**1000)
# Elements that `normalised_rows` works on at once.
_NORMALISED_PER_CHUNK = 1 << 16


@np.errstate(all="ignore")
def round_to_float32(hi: Float64s, lo: Float64s) -> Float32s:
    """Return hi + lo rounded once to float32, to nearest even; lo is much smaller than float32's spacing at hi."""
    nearest = hi.astype(np.float32)
    # Rounding to infinity means rounding to 2^128, the number that would follow float32's largest.
    back = np.where(np.isinf(nearest), np.copysign(_ABOVE_FLOAT32, nearest), nearest.astype(np.float64))
    rest = hi - back
    neighbour = np.nextafter(nearest, np.where(rest > 0, np.float32(np.inf), np.float32(-np.inf)), dtype=np.float32)
    beyond = np.where(np.isinf(neighbour), np.copysign(_ABOVE_FLOAT32, neighbour), neighbour.astype(np.float64))
    # Where hi is half-way between two float32 numbers, astype rounded it to even, but the sign of lo decides.
    is_tie = (rest != 0) & (2.0 * rest == beyond - back) & (np.sign(lo) == np.sign(rest)) & np.isfinite(hi)
    return np.where(is_tie, neighbour, nearest)


def round_fraction(value: Fraction) -> np.float32:
    """Return a rational rounded once to float32, to nearest even."""
    try:
        hi = float(value)
    except OverflowError:
        return np.float32(np.inf if value > 0 else -np.inf)
    rest = value - Fraction(hi)
    lo = 0.0 if rest == 0 else (2.0**-1074 if rest > 0 else -(2.0**-1074))
    return np.float32(round_to_float32(np.array([hi]), np.array([lo]))[0])


@denormals_enabled()
def normalised_columns(v: Floats, g: Floats) -> Float32s:
    """Return g * v / |v| with the norm taken per column, each element the exact value rounded once to float32.

    Args:
        v: (K, D) float32 or float64, finite.
        g: (1, D) of the same type.

    Returns:
        (K, D); a column of zeros gives NaN, as division by its norm does.
    """
    return np.stack([_normalised_column(v[:, k], g[0, k]) for k in range(v.shape[1])], axis=1)


def _normalised_column(v: Floats, g: np.floating) -> Float32s:
    wide, scale = v.astype(np.float64), float(g)
    with np.errstate(all="ignore"):
        if v.dtype == np.float32:
            # Squares of float32 numbers are exact in float64, and fsum rounds once.
            sum_of_squares, rounding = math.fsum(wide * wide), 2.0**-53
        else:
            sum_of_squares, rounding = float(np.sum(wide * wide)), gamma(2 * v.size, np.float64)
        values = scale * wide / np.sqrt(sum_of_squares)
        # The root halves the relative error of the sum; root, product and quotient are each rounded once.
        error = np.abs(values) * (rounding + 8 * 2.0**-53) + 2.0**-1070
        if not _SAFE_SQUARES[0] < sum_of_squares < _SAFE_SQUARES[1]:
            error[:] = np.inf
        below, above = (values - error).astype(np.float32), (values + error).astype(np.float32)
        out: Float32s = values.astype(np.float32) + np.float32(0.0)
    is_open = np.nonzero(~(below == above))[0]
    if is_open.size:
        exact_sum = sum((Fraction(x) ** 2 for x in wide.tolist()), Fraction(0))
        if exact_sum == 0:
            return np.full_like(out, np.nan)
        for k in is_open:
            out[k] = round_quotient(Fraction(scale) * Fraction(float(wide[k])), exact_sum)
    return out


def round_quotient(numerator: Fraction, square: Fraction) -> np.float32:
    """Return numerator / sqrt(square) rounded once to float32."""
    # The root of the squared quotient to a relative 2^-200, rounded down; `exact` says whether it is the exact value.
    target = numerator * numerator / square
    if target == 0:
        return np.float32(0.0)
    shift = max(0, 400 - target.numerator.bit_length() + target.denominator.bit_length())
    shift += shift % 2
    scaled = (target.numerator << shift) // target.denominator
    root = math.isqrt(scaled)
    exact = root * root == scaled and (target.numerator << shift) % target.denominator == 0
    # For an inexact root add half a unit (a sticky bit), so that it never lies on a rounding boundary.
    value = Fraction(2 * root + (0 if exact else 1), 2 << (shift // 2))
    return round_fraction(value if numerator > 0 else -value)


@denormals_enabled()
def normalised_rows(rows: Floats, least: float = 0.0) -> Float32s:
    """Return rows / max(|row|, least), each element the exact value rounded once to float32, to nearest even.

    Args:
        rows: (n, D) float32 or float64, finite.
        least: a float32 number; shorter rows are divided by it.

    Returns:
        (n, D); zero is +0.0, and a row of zeros stays zero.
    """
    out = np.empty(rows.shape, np.float32)
    step = max(1, _NORMALISED_PER_CHUNK // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        chunk = slice(start, start + step)
        out[chunk] = _normalised(rows[chunk], least)
    return out


def _normalised(rows: Floats, least: float) -> Float32s:
    wide, shortest = rows.astype(np.float64), np.full((len(rows), 1), least)
    if rows.dtype != np.float32:
        # Scaling by a power of two does not change the quotient, and keeps the squares within float64's range. The
        # squares of float32 numbers are within it anyway.
        _, exponents = np.frexp(np.abs(wide).max(axis=1, keepdims=True))
        wide = np.ldexp(wide, -exponents)
        # Infinite only beside numbers so small that their quotients are zero.
        with np.errstate(over="ignore"):
            shortest = np.ldexp(shortest, -exponents)
    lengths = np.maximum(np.sqrt(np.square(wide).sum(axis=1, keepdims=True)), shortest)
    # Rounded are: D squares, D sums, a root, which halves the relative error so far, and a quotient.
    out, is_open = _rounded_quotients(wide, np.where(lengths > 0, lengths, 1.0), roundings=rows.shape[1] + 10)
    for row in np.nonzero(is_open.any(axis=1))[0]:
        out[row] = _normalised_row(wide[row], float(shortest[row, 0]))
    return out


def _normalised_row(row: Float64s, shortest: float) -> Float32s:
    # fsum rounds once, and so do the squares.
    length = max(math.sqrt(math.fsum(np.square(row))), shortest)
    out, is_open = _rounded_quotients(row, np.float64(length), roundings=10)
    if is_open.any():
        exact = [Fraction(x) for x in row.tolist()]
        square = max(sum((x * x for x in exact), Fraction(0)), Fraction(shortest) ** 2)
        for column in np.nonzero(is_open)[0]:
            out[column] = round_quotient(exact[column], square)
    return out


def _rounded_quotients(
    values: Float64s, lengths: Float64s | np.float64, *, roundings: int
) -> tuple[Float32s, npt.NDArray[np.bool_]]:
    """Return values / lengths in float32, and where that is open after so many roundings, each of 2^-53 at most."""
    quotients = values / lengths
    # Quotients that underflow in float64 have no such relative error, but all of them are zero in float32.
    error = gamma(roundings, np.float64)
    below, above = (quotients * (1.0 - error)).astype(np.float32), (quotients * (1.0 + error)).astype(np.float32)
    return below + np.float32(0.0), below != above


def round_inverse_root(count: int) -> np.float32:
    """Return 1 / sqrt(count) rounded once to float32."""
    return round_quotient(Fraction(1), Fraction(count))
