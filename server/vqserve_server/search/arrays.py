"""A codebook in numpy arrays, prepared for the compiled search."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vqserve_server.search import native
from vqserve_server.search.denormals import denormals_enabled
from vqserve_server.search.equals import first_of_equals
from vqserve_server.search.searcher import MergedSearcher, Objective, RowSearcher

if TYPE_CHECKING:
    from vqserve_server.search.searcher import Searcher

Floats = npt.NDArray[np.floating[Any]]


@denormals_enabled()
def prepare_arrays(
    codes: Floats, *, objective: Objective = Objective.L2, bias: Floats | None = None
) -> RowSearcher[npt.NDArray[Any]] | None:
    """Prepare a codebook for the compiled search; None: it is not there, or does not take this codebook.

    Args:
        codes: (K, D) float32 or float64, finite, not to be changed any more.
        objective: quantity by which the winning code is chosen.
        bias: (K,) of the codes' dtype, added to the scores of DOT; None: zero.
    """
    if not native.levels() or not native.fits(codes, bias, objective):
        return None
    firsts = first_of_equals(codes, bias)
    if firsts is None:
        return _prepare(codes, bias, objective)
    return MergedSearcher(_prepare(codes[firsts], None if bias is None else bias[firsts], objective), firsts)


def _prepare(codes: Floats, bias: Floats | None, objective: Objective) -> RowSearcher[npt.NDArray[Any]]:
    def fallback() -> Searcher:
        import torch  # noqa: PLC0415

        from vqserve_server.search.tiled import TiledSearcher  # noqa: PLC0415

        biases = None if bias is None else torch.from_numpy(bias)
        return TiledSearcher(torch.from_numpy(codes), biases, objective, dtype=torch.float64)

    return native.NativeSearcher(codes.astype(np.float32, copy=False), bias, objective, fallback=fallback)
