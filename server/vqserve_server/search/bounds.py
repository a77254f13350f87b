"""Error bounds of computed scores (docs/exact-search.md derives them).

Codebooks and rows are arrays of numpy or of torch, and so are their bounds; torch is not imported here. What the two
libraries compute is in `wide_arrays` and `wide_tensors`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic

import numpy as np
import numpy.typing as npt

from vqserve_server.search import wide_arrays
from vqserve_server.search.searcher import ArrayT, Objective

if TYPE_CHECKING:
    import torch

    DType = npt.DTypeLike | torch.dtype

# By the name of a type.
UNIT_ROUNDOFF = {"float32": 2.0**-24, "float64": 2.0**-53}
SMALLEST_SUBNORMAL = {"float32": 2.0**-149, "float64": 2.0**-1074}
# Smaller products may be flushed to zero.
_TINY = {"float32": 2.0**-124, "float64": 2.0**-1000}
# Sums up to this do not overflow, errors included.
_LARGEST_SUM = {"float32": 2.0**125, "float64": 2.0**1020}
# Bounds are rounded to the scores' type; this factor is far more than that rounding.
_SLACK = 1.0 + 2.0**-20


def name_of(dtype: DType) -> str:
    """Return the name of a type of numpy or torch."""
    text = str(dtype)
    return text.removeprefix("torch.") if text.startswith("torch.") else np.dtype(dtype).name  # type: ignore[arg-type]


def gamma(operations: int, dtype: DType) -> float:
    """Return Higham's gamma_n = n u / (1 - n u), a bound on the relative error of n roundings in any order.

    Source: N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., lemma 3.1.
    """
    nu = operations * UNIT_ROUNDOFF[name_of(dtype)]
    if nu >= 0.5:
        raise ValueError(f"no useful error bound for {operations} operations in {dtype}")
    return nu / (1.0 - nu)


def norms_above(vectors: ArrayT) -> ArrayT:
    """Return (n,) float64 upper bounds of the Euclidean norms of (n, D) vectors, computed in float64."""
    dim = _width(vectors)
    # D squarings, D - 1 additions and a square root each add a relative error, and so does the final product.
    safety = 1.0 + gamma(dim + 4, np.float64)
    # Squares that underflow reduce the norm by at most sqrt(D * 2^-1074).
    lost = dim * 2.0**-537
    norms: ArrayT = _library_of(vectors).norms(vectors) * safety + lost
    return norms


def row_norms(rows: ArrayT, dtype: DType) -> ArrayT:
    """Return (n,) upper bounds of the norms of (n, D) rows, in the type of the scores."""
    above: Any = norms_above(rows)
    norms: ArrayT = _library_of(rows).cast(above * _SLACK, dtype)
    return norms


@dataclass(frozen=True)
class ScoreBounds(Generic[ArrayT]):
    """The winner has the greatest score z . a + offset; a score's error is at most slope * |z| + base.

    Attributes:
        offset: (K,) -|a|^2 / 2 for L2, b for DOT.
        slope: (K,) error of the score per unit of |z|.
        base: (K,) error of the score at |z| = 0.
        longest_row: greatest |z| for which no partial sum overflows; the bound holds up to it.
    """

    offset: ArrayT
    slope: ArrayT
    base: ArrayT
    longest_row: float

    @classmethod
    def of(cls, codes: ArrayT, bias: ArrayT | None, objective: Objective, dtype: DType) -> ScoreBounds[ArrayT]:
        """Return the bounds of a codebook (K, D) for scores computed in `dtype`, summed in any order."""
        library = _library_of(codes)
        dim, name = _width(codes), name_of(dtype)
        if objective is Objective.L2:
            offset = library.sums_of_squares(codes) * -0.5
        elif bias is not None:
            offset = library.to_float64(bias)
        else:
            offset = library.zeros_for(codes)
        # Rounded are: row, code, their products and sums, the offset, the bound, and the sums of score and bound.
        relative = gamma(2 * dim + 24, dtype)
        tiny = (2 * dim + 24) * _TINY[name]
        norms: Any = norms_above(codes)
        longest = float(norms.max())
        return cls(
            offset=library.cast(offset, dtype),
            slope=library.cast((relative * norms + tiny) * _SLACK, dtype),
            base=library.cast((relative * abs(offset) + tiny * (1 + norms)) * _SLACK, dtype),
            # In any order of summation no partial sum exceeds |z||a| + |offset|. The result is negative, so that no row
            # is short enough, if codes or offsets themselves exceed the range of `dtype`.
            longest_row=(_LARGEST_SUM[name] - max(float(abs(offset).max()), longest)) / max(longest, 2.0**-100),
        )


def _width(vectors: Any) -> int:
    width: int = vectors.shape[1]
    return width


def _library_of(array: object) -> Any:
    """Return the module that computes with arrays of this kind."""
    if isinstance(array, np.ndarray):
        return wide_arrays
    return importlib.import_module("vqserve_server.search.wide_tensors")
