"""Rounding-error bounds of dot products (docs/exact-search.md derives them)."""

from __future__ import annotations

import torch
from torch import Tensor

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
SMALLEST_SUBNORMAL = {torch.float32: 2.0**-149, torch.float64: 2.0**-1074}


def gamma(operations: int, dtype: torch.dtype) -> float:
    """Return Higham's gamma_n = n u / (1 - n u), the relative error of n roundings in any order.

    Source: N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., lemma 3.1.
    """
    nu = operations * UNIT_ROUNDOFF[dtype]
    if nu >= 0.5:
        raise ValueError(f"no useful error bound for {operations} operations in {dtype}")
    return nu / (1.0 - nu)


def norms_above(vectors: Tensor) -> Tensor:
    """Return (n,) float64 upper bounds of the Euclidean norms of (n, D) vectors, computed in float64."""
    wide = vectors.to(torch.float64)
    # D squarings, D - 1 additions and a square root, each with a relative error; the last factor covers the product.
    safety = 1.0 + gamma(vectors.shape[1] + 4, torch.float64)
    # Squares that underflow lose at most sqrt(D * 2^-1074) of the norm.
    norms: Tensor = torch.linalg.vector_norm(wide, dim=1)
    return norms * safety + vectors.shape[1] * 2.0**-537
