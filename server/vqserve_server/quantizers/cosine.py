"""The quantizer that takes the code of the greatest cosine."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from vqserve_server.quantizers.dtypes import widen
from vqserve_server.quantizers.lookup import LookupQuantizer
from vqserve_server.quantizers.search_problem import SearchProblem
from vqserve_server.search import Objective
from vqserve_server.search.rounding import normalise


class CosineQuantizer(LookupQuantizer):
    """index = argmax_j z . u_j with u_j = e_j / |e_j|, each element of u rounded once to float32.

    The latent is not normalised: its length is positive and common to all codes, so that it decides nothing, and what
    is searched is the latent as it came (after `proj_in`, if there is one). A code of zeros has u = 0 and scores 0.

    Cosine search of l2-normalised codes: Yu et al. 2021, arXiv:2110.04627; of raw rows behind projections: Kumar et
    al. 2023, arXiv:2306.06546. See `LookupQuantizer` for the state.

    Attributes:
        decode_normalized: whether code rows are u_j (LlamaGen) or e_j (DAC, lucidrains).
    """

    kind: ClassVar[str] = "cosine"

    def __init__(self, n_e: int, e_dim: int, decode_normalized: bool = False, **kwargs: Any) -> None:
        """Draw a codebook; a state dict is to follow.

        Args:
            n_e: K, the number of codes.
            e_dim: D, the width of a code.
            decode_normalized: decode to rows of length one, and not to the rows as they are stored.
            **kwargs: further arguments of `LookupQuantizer`.

        Raises:
            InvalidArgument: an argument or the remap is not valid; see `AbstractQuantizer`.
        """
        super().__init__(n_e, e_dim, **kwargs)
        self.decode_normalized = bool(decode_normalized)

    def search_problem(self) -> SearchProblem:
        """Return the search for the greatest dot product with the normalised rows."""
        return SearchProblem(codes=self._unit_rows(), objective=Objective.DOT)

    def code_rows(self) -> Tensor:
        """Return the rows (K, D) that decode gathers, detached, in the weight's type: e, or u as float32 rounds it."""
        return self._unit_rows().to(self.weight_dtype) if self.decode_normalized else super().code_rows()

    def lookup(self, ids: Tensor) -> Tensor:
        """Return the code rows (N, D) of full ids (N,): the values of `code_rows` with the weight's gradient."""
        rows = super().lookup(ids)
        if not self.decode_normalized:
            return rows
        unit = functional.normalize(rows, dim=1)
        return self.code_rows()[ids] + (unit - unit.detach())

    def _unit_rows(self) -> Tensor:
        weight = widen(self.embedding.weight)
        if not bool(torch.isfinite(weight).all()):
            # Diverged: the search refuses it, and names the code.
            return weight
        return normalise(weight)
