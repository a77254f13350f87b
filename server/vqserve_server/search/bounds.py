"""Error bounds of computed scores (docs/exact-search.md derives them)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vqserve_server.search.denormals import copy_as_float64, to_float64
from vqserve_server.search.searcher import Objective

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
SMALLEST_SUBNORMAL = {torch.float32: 2.0**-149, torch.float64: 2.0**-1074}
# Smaller products may be flushed to zero.
_TINY = {torch.float32: 2.0**-124, torch.float64: 2.0**-1000}
# Sums up to this do not overflow, errors included.
_LARGEST_SUM = {torch.float32: 2.0**125, torch.float64: 2.0**1020}
# Bounds are rounded to the scores' type; this factor is far more than that rounding.
_SLACK = 1.0 + 2.0**-20
# Bytes of one chunk in float64.
_CHUNK_BYTES = 1 << 22


def gamma(operations: int, dtype: torch.dtype) -> float:
    """Return Higham's gamma_n = n u / (1 - n u), a bound on the relative error of n roundings in any order.

    Source: N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., lemma 3.1.
    """
    nu = operations * UNIT_ROUNDOFF[dtype]
    if nu >= 0.5:
        raise ValueError(f"no useful error bound for {operations} operations in {dtype}")
    return nu / (1.0 - nu)


def norms_above(vectors: Tensor) -> Tensor:
    """Return (n,) float64 upper bounds of the Euclidean norms of (n, D) vectors, computed in float64."""
    # D squarings, D - 1 additions and a square root each add a relative error, and so does the final product.
    safety = 1.0 + gamma(vectors.shape[1] + 4, torch.float64)
    # Squares that underflow reduce the norm by at most sqrt(D * 2^-1074).
    lost = vectors.shape[1] * 2.0**-537
    norms = torch.empty(vectors.shape[0], dtype=torch.float64, device=vectors.device)
    for part, wide in _wide_chunks(vectors):
        torch.linalg.vector_norm(wide, dim=1, out=norms[part])
    return norms * safety + lost


def row_norms(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (n,) upper bounds of the norms of (n, D) rows, in the type of the scores."""
    return (norms_above(rows) * _SLACK).to(dtype)


@dataclass(frozen=True)
class ScoreBounds:
    """The winner has the greatest score z . a + offset; a score's error is at most slope * |z| + base.

    Attributes:
        offset: (K,) -|a|^2 / 2 for L2, b for DOT.
        slope: (K,) error of the score per unit of |z|.
        base: (K,) error of the score at |z| = 0.
        longest_row: greatest |z| for which no partial sum overflows; the bound holds up to it.
    """

    offset: Tensor
    slope: Tensor
    base: Tensor
    longest_row: float

    @classmethod
    def of(cls, codes: Tensor, bias: Tensor | None, objective: Objective, dtype: torch.dtype) -> ScoreBounds:
        """Return the bounds of a codebook (K, D) for scores computed in `dtype`, summed in any order."""
        num_codes, dim = codes.shape
        if objective is Objective.L2:
            offset = torch.empty(num_codes, dtype=torch.float64, device=codes.device)
            for part, wide in _wide_chunks(codes):
                torch.sum(wide.square_(), dim=1, out=offset[part])
            offset *= -0.5
        elif bias is not None:
            offset = to_float64(bias.detach())
        else:
            offset = torch.zeros(num_codes, dtype=torch.float64, device=codes.device)
        # Rounded are: row, code, their products and sums, the offset, the bound, and the sums of score and bound.
        relative = gamma(2 * dim + 24, dtype)
        tiny = (2 * dim + 24) * _TINY[dtype]
        norms = norms_above(codes)
        longest = float(norms.max())
        return cls(
            offset=offset.to(dtype),
            slope=((relative * norms + tiny) * _SLACK).to(dtype),
            base=((relative * offset.abs() + tiny * (1 + norms)) * _SLACK).to(dtype),
            # In any order of summation no partial sum exceeds |z||a| + |offset|. The result is negative, so that no row
            # is short enough, if codes or offsets themselves exceed the range of `dtype`.
            longest_row=(_LARGEST_SUM[dtype] - max(float(offset.abs().max()), longest)) / max(longest, 2.0**-100),
        )


def _wide_chunks(vectors: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield parts of vectors in float64, all in one buffer, which the caller may change.

    With a buffer for each part, the memory of a large codebook grew by twice its size: torch's aligned allocations do
    not fit the holes that earlier ones of the same size leave.
    """
    count, dim = vectors.shape
    step = max(1, _CHUNK_BYTES // (8 * dim))
    buffer = torch.empty(min(step, count), dim, dtype=torch.float64, device=vectors.device)
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        yield part, copy_as_float64(buffer[: part.stop - start], vectors[part].detach())
