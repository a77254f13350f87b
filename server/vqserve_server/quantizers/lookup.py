"""A codebook for inference, with or without projections around it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqserve_server.quantizers.abstract import AbstractQuantizer
from vqserve_server.quantizers.projections import ProjectedModule, projection
from vqserve_server.quantizers.remap import Remap, UnknownIndex


class LookupQuantizer(ProjectedModule, AbstractQuantizer):
    """K codes of width D, of which a subclass says how they are searched. Inference only: there is no `forward`.

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
