"""Codebooks for inference, with or without projections around them: searched by cosine or by dot product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vqserve_server.quantizers.abstract import AbstractQuantizer
from vqserve_server.quantizers.declared import CodeSpace
from vqserve_server.quantizers.objective import SearchProblem
from vqserve_server.quantizers.plain_kinds import CosineKind, DotKind
from vqserve_server.quantizers.projections import ProjectedModule, projection
from vqserve_server.quantizers.remap import Remap, UnknownIndex
from vqserve_server.quantizers.tensors import widen
from vqserve_server.search import Objective
from vqserve_server.search.rounding import normalise


class LookupQuantizer(ProjectedModule, AbstractQuantizer):
    """K codes of width D; a subclass defines the search. Inference only: there is no `forward`.

    State: `embedding.weight` (K, D), `used` (U,) with a remap, and the tensors of `ProjectedModule` for the
    projections that there are.

    Attributes:
        embedding: the codes.
        n_e: K.
        e_dim: D.
    """

    def __init__(  # noqa: PLR0917
        self,
        n_e: int,
        e_dim: int,
        input_dim: int | None = None,
        output_dim: int | None = None,
        remap: Remap | None = None,
        unknown_index: UnknownIndex = "random",
    ) -> None:
        """Draw the codebook and the projections as torch's layers do; a state dict is to follow.

        Args:
            n_e: K, the number of codes.
            e_dim: D, the width of a code.
            input_dim: channels that are projected to D before the search; None: D, without a projection.
            output_dim: channels that codes are projected to when they are decoded; None: D, without a projection.
            remap: path of a .npy file, or an integer array, of the full ids in use.
            unknown_index: "random", "extra" or an integer: what an id outside the remap is reported as.

        Raises:
            InvalidArgument: an argument or the remap is not valid; see `AbstractQuantizer`.
        """
        super().__init__(num_codes=n_e, input_dim=e_dim, code_dim=e_dim, remap=remap, unknown_index=unknown_index)
        self.n_e = self.num_codes
        self.e_dim = self.code_dim
        self.embedding = nn.Embedding(n_e, e_dim)
        self.proj_in = projection("input_dim", input_dim, e_dim)
        self.proj_out = projection("output_dim", e_dim, output_dim)
        if input_dim is not None:
            self.input_dim = int(input_dim)
        if output_dim is not None:
            self.output_dim = int(output_dim)

    def code_rows(self) -> Tensor:
        """Return the codebook (K, D), detached."""
        return self.embedding.weight.detach()

    def lookup(self, ids: Tensor) -> Tensor:
        """Return the code rows (N, D) of full ids (N,)."""
        rows: Tensor = self.embedding(ids)
        return rows

    @property
    def weight_dtype(self) -> torch.dtype:
        """The type that decode returns."""
        return self.embedding.weight.dtype


class CosineQuantizer(CosineKind, LookupQuantizer):
    """index = argmax_j z . u_j with u_j = e_j / |e_j|, each element of u rounded once to float32.

    The latent is not normalised: its length is positive and common to all codes, so that it decides nothing, and what
    is searched is the latent as it came (after `proj_in`, if there is one). A code of zeros has u = 0 and scores 0.

    Cosine search of l2-normalised codes: Yu et al. 2021, arXiv:2110.04627; of raw rows behind projections: Kumar et
    al. 2023, arXiv:2306.06546. See `LookupQuantizer` for the state.

    Attributes:
        decode_normalized: whether code rows are u_j (LlamaGen) or e_j (DAC, lucidrains).
    """

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

    @property
    def code_space(self) -> CodeSpace:
        """Lengths have no effect."""
        return "directions"

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
            # Diverged: the search rejects the weight, and its error names the code.
            return weight
        return normalise(weight)


class DotQuantizer(DotKind, LookupQuantizer):
    """index = argmax_j z . e_j, decoded as e_j.

    How index backpropagation quantization searches: its logits are z . e_j without a bias (Shi et al. 2024,
    arXiv:2412.02692). See `LookupQuantizer` for arguments and state.
    """

    def search_problem(self) -> SearchProblem:
        """Return the search for the greatest dot product."""
        return SearchProblem(codes=widen(self.embedding.weight), objective=Objective.DOT)
