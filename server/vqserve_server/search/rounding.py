"""Values that are computed exactly and rounded once to float32, the same on every device.

Each element is computed in float64 first. If its error interval contains a rounding boundary, the element is computed
again in twice that precision, and if that does not decide either, with rationals.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqserve_server.search.bounds import SMALLEST_SUBNORMAL, gamma, norms_above
from vqserve_server.search.denormals import denormals_enabled, to_float64
from vqserve_server.search.exact import sum_of_products, two_sum
from vqserve_server.search.quotients import normalised_columns, normalised_rows, round_fraction, round_to_float32

Float64s = npt.NDArray[np.float64]
Float32s = npt.NDArray[np.float32]

# Elements of one tile of rows or of outputs: 8 MiB in float64.
_TILE_ELEMENTS = 1 << 20
_ELEMENTS_PER_CHUNK = 1 << 18
_SAFE_FROM_FLUSHING = 2.0**-125


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


def weight_norm(v: Tensor, g: Tensor) -> Tensor:
    """Return g * v / |v| with the norm taken per column, each element the exact value rounded once to float32.

    Weight normalisation: Salimans and Kingma, 2016 (arXiv:1602.07868).

    Args:
        v: (K, D) float32 or float64, finite.
        g: (1, D).

    Returns:
        (K, D) float32 on v's device; a column of zeros gives NaN, as division by its norm does.
    """
    return torch.from_numpy(normalised_columns(v.detach().cpu().numpy(), g.detach().cpu().numpy())).to(v.device)


def normalise(rows: Tensor, least: float = 0.0) -> Tensor:
    """Return rows / max(|row|, least), each element the exact value rounded once to float32, to nearest even.

    Args:
        rows: (n, D) float32 or float64, finite.
        least: a float32 number; shorter rows are divided by it.

    Returns:
        (n, D) float32 on the rows' device; zero is +0.0, and a row of zeros stays zero.
    """
    return torch.from_numpy(normalised_rows(rows.detach().cpu().numpy(), least)).to(rows.device)
