"""Rows of length one, computed exactly and rounded once to float32."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqserve_server.search.bounds import gamma
from vqserve_server.search.rounding import Float32s, round_quotient

_ELEMENTS_PER_CHUNK = 1 << 20
# More than what underflows in float64 takes away, and far less than float32 can tell from zero.
_LOST = 2.0**-1000


def normalise(rows: Tensor) -> Tensor:
    """Return rows / |row|, each element the exact value rounded once to float32, to nearest even.

    Args:
        rows: (n, D) float32 or float64, finite.

    Returns:
        (n, D) float32 on the rows' device; zero is +0.0, and a row of zeros stays one.
    """
    values = rows.detach().cpu().numpy()
    out = np.empty(values.shape, np.float32)
    step = max(1, _ELEMENTS_PER_CHUNK // values.shape[1])
    for start in range(0, values.shape[0], step):
        chunk = slice(start, start + step)
        out[chunk] = _normalised(values[chunk].astype(np.float64))
    return torch.from_numpy(out).to(rows.device)


def _normalised(rows: npt.NDArray[np.float64]) -> Float32s:
    # A power of two more or less does not change the quotient, and keeps the squares within float64's range.
    _, exponents = np.frexp(np.abs(rows).max(axis=1, keepdims=True))
    scaled = np.ldexp(rows, -exponents)
    norms = np.sqrt(np.square(scaled).sum(axis=1, keepdims=True))
    quotients = scaled / np.where(norms > 0, norms, 1.0)
    # D squares, as many sums, a root, which halves their error, and a quotient.
    error = np.abs(quotients) * gamma(rows.shape[1] + 8, torch.float64) + _LOST
    below, above = (quotients - error).astype(np.float32), (quotients + error).astype(np.float32)
    out: Float32s = quotients.astype(np.float32) + np.float32(0.0)
    for row in np.nonzero(~(below == above).all(axis=1))[0]:
        exact = [Fraction(x) for x in scaled[row].tolist()]
        square = sum((x * x for x in exact), Fraction(0))
        for column in np.nonzero(~(below[row] == above[row]))[0]:
            out[row, column] = round_quotient(exact[column], square)
    return out


def round_inverse_root(count: int) -> np.float32:
    """Return 1 / sqrt(count) rounded once to float32."""
    return round_quotient(Fraction(1), Fraction(count))
