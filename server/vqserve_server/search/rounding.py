"""Values that are computed exactly and rounded once to float32, the same on every device.

Each element is computed in float64 first. If its error interval contains a rounding boundary, the element is computed
again in twice that precision, and if that does not decide either, with rationals.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqserve_server.search.bounds import SMALLEST_SUBNORMAL, gamma, norms_above
from vqserve_server.search.denormals import denormals_enabled, to_float64
from vqserve_server.search.exact import sum_of_products, two_sum

Float64s = npt.NDArray[np.float64]
Float32s = npt.NDArray[np.float32]

# Elements of one tile of rows or of outputs: 8 MiB in float64.
_TILE_ELEMENTS = 1 << 20
_ELEMENTS_PER_CHUNK = 1 << 18
_ABOVE_FLOAT32 = np.float64(2.0**128)
_SAFE_FROM_FLUSHING = 2.0**-125
# A sum of squares between these did not overflow, and no square that matters underflowed.
_SAFE_SQUARES = (2.0**-900, 2.0**1000)
# Elements that `normalise` works on at once.
_NORMALISED_PER_CHUNK = 1 << 16


@denormals_enabled()
def affine(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return rows @ weight.T + bias, each element the exact value rounded once to float32.

    Args:
        rows: (n, C) float32 or float64, finite.
        weight: (D, C) float32 or float64, finite, on the rows' device.
        bias: (D,) or None.

    Returns:
        (n, D) float32 on the rows' device; zero is +0.0, and values beyond float32's range are infinite.
    """
    products = _AffineElements(weight, bias)
    out = torch.empty(rows.shape[0], weight.shape[0], dtype=torch.float32, device=rows.device)
    step = max(1, _TILE_ELEMENTS // max(1, *weight.shape))
    for start in range(0, rows.shape[0], step):
        tile = slice(start, start + step)
        out[tile] = products.rounded(rows[tile])
    return out


class _AffineElements:
    """Affine map in float64 with error bounds; elements that these do not decide are computed again exactly."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight.detach()
        self._bias = weight.new_zeros(weight.shape[0]) if bias is None else bias.detach()
        self._wide_weight = to_float64(self._weight)
        self._wide_bias = to_float64(self._bias)
        relative = gamma(weight.shape[1] + 16, torch.float64)
        self._error_per_norm = relative * norms_above(weight)
        self._error_constant = relative * self._wide_bias.abs() + 8.0 * weight.shape[1] * SMALLEST_SUBNORMAL["float64"]

    def rounded(self, rows: Tensor) -> Tensor:
        wide = to_float64(rows)
        values = torch.addmm(self._wide_bias, wide, self._wide_weight.T)
        error = torch.addmm(self._error_constant, norms_above(wide)[:, None], self._error_per_norm[None, :])
        below, above = (values - error).to(torch.float32), (values + error).to(torch.float32)
        # Adding zero turns -0.0 into 0.0: no float64 bound could decide the sign of a zero.
        out = values.to(torch.float32) + 0.0
        is_open = ~(below == above)
        # numpy rounds subnormal results, because torch's threads may flush them to zero.
        size = values.abs_()
        is_open |= (size < _SAFE_FROM_FLUSHING) & (error.add_(size) >= SMALLEST_SUBNORMAL["float32"] / 4)
        if bool(is_open.any()):
            where = torch.nonzero(is_open)
            out[is_open] = torch.from_numpy(self._settle(rows, where)).to(rows.device)
        return out

    def _settle(self, rows: Tensor, where: Tensor) -> Float32s:
        settled = []
        step = max(1, _ELEMENTS_PER_CHUNK // (rows.shape[1] + 1))
        for chunk in torch.split(where, step):
            i, j = chunk.T
            x = torch.cat([to_float64(rows[i]), self._wide_bias[j][:, None]], dim=1).cpu().numpy()
            y = torch.cat([self._wide_weight[j], self._wide_weight.new_ones(j.numel(), 1)], dim=1).cpu().numpy()
            settled.append(self._settle_chunk(x, y, rows.dtype))
        return np.concatenate(settled)

    def _settle_chunk(self, x: Float64s, y: Float64s, dtype: torch.dtype) -> Float32s:
        exact_products = dtype == torch.float32 and self._weight.dtype == torch.float32
        value = sum_of_products(x, y, exact_products=exact_products)
        with np.errstate(all="ignore"):
            out = round_to_float32(value.hi, value.lo)
            # nextafter moves each end outwards by one step, which covers the rounding of lo -+ error.
            below = round_to_float32(*two_sum(value.hi, np.nextafter(value.lo - value.error, -np.inf)))
            above = round_to_float32(*two_sum(value.hi, np.nextafter(value.lo + value.error, np.inf)))
        for m in np.nonzero((value.error > 0) & ~(below == above))[0]:
            out[m] = round_fraction(
                sum((Fraction(a) * Fraction(b) for a, b in zip(x[m].tolist(), y[m].tolist(), strict=True)), Fraction(0))
            )
        return out + np.float32(0.0)


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
def weight_norm(v: Tensor, g: Tensor) -> Tensor:
    """Return g * v / |v| with the norm taken per column, each element the exact value rounded once to float32.

    Weight normalisation: Salimans and Kingma, 2016 (arXiv:1602.07868).

    Args:
        v: (K, D) float32 or float64, finite.
        g: (1, D).

    Returns:
        (K, D) float32 on v's device; a column of zeros gives NaN, as division by its norm does.
    """
    directions, scales = v.detach().cpu().numpy(), g.detach().cpu().numpy()[0]
    columns = [_normalised_column(directions[:, k], scales[k]) for k in range(directions.shape[1])]
    return torch.from_numpy(np.stack(columns, axis=1)).to(v.device)


def _normalised_column(v: npt.NDArray[np.floating], g: np.floating) -> Float32s:
    wide, scale = v.astype(np.float64), float(g)
    with np.errstate(all="ignore"):
        if v.dtype == np.float32:
            # Squares of float32 numbers are exact in float64, and fsum rounds once.
            sum_of_squares, rounding = math.fsum(wide * wide), 2.0**-53
        else:
            sum_of_squares, rounding = float(np.sum(wide * wide)), gamma(2 * v.size, torch.float64)
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
def normalise(rows: Tensor, least: float = 0.0) -> Tensor:
    """Return rows / max(|row|, least), each element the exact value rounded once to float32, to nearest even.

    Args:
        rows: (n, D) float32 or float64, finite.
        least: a float32 number; shorter rows are divided by it.

    Returns:
        (n, D) float32 on the rows' device; zero is +0.0, and a row of zeros stays zero.
    """
    values = rows.detach().cpu().numpy()
    out = np.empty(values.shape, np.float32)
    step = max(1, _NORMALISED_PER_CHUNK // values.shape[1])
    for start in range(0, values.shape[0], step):
        chunk = slice(start, start + step)
        out[chunk] = _normalised(values[chunk], least)
    return torch.from_numpy(out).to(rows.device)


def _normalised(rows: npt.NDArray[np.floating], least: float) -> Float32s:
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
    error = gamma(roundings, torch.float64)
    below, above = (quotients * (1.0 - error)).astype(np.float32), (quotients * (1.0 + error)).astype(np.float32)
    return below + np.float32(0.0), below != above


def round_inverse_root(count: int) -> np.float32:
    """Return 1 / sqrt(count) rounded once to float32."""
    return round_quotient(Fraction(1), Fraction(count))
