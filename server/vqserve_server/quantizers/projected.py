"""The vector quantizer that projects its input to narrow codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from vqserve.errors import CodebookError
from vqserve_server.quantizers.arguments import CODE_DIM, CODES, INPUT_DIM, OUTPUT_PROJECTION, Argument, number
from vqserve_server.quantizers.plain_kinds import VECTOR_ARGUMENTS
from vqserve_server.quantizers.projections import ProjectedModule, projection
from vqserve_server.quantizers.tensors import (
    apply_layer,
    autocast_off,
    check_not_empty,
    check_size,
    from_rows,
    grid_of,
    to_rows,
    widen,
)
from vqserve_server.quantizers.vector import VectorQuantizer
from vqserve_server.search.rounding import affine


class VectorQuantizerWithInputProjection(ProjectedModule, VectorQuantizer):
    """Nearest code to a learnt projection of the input (van den Oord et al. 2017; Yu et al. 2021, arXiv:2110.04627).

    State: that of `VectorQuantizer`, `proj_in.weight` (D, C), `proj_in.bias` (D,), and with an output_dim
    `proj_out.weight` (output_dim, D), `proj_out.bias` (output_dim,).

    Attributes:
        proj_in: the projection from C = input_dim to D = codebook_dim channels.
        proj_out: the projection to output_dim channels; nn.Identity without one.
        output_dim: channels of the output; D without a projection.
    """

    kind: ClassVar[str] = "vq_projection"
    arguments: ClassVar[Mapping[str, Argument]] = {
        "input_dim": INPUT_DIM,
        "n_codes": CODES,
        "codebook_dim": CODE_DIM,
        "beta": Argument(number, default=1.0),
        **OUTPUT_PROJECTION,
        **VECTOR_ARGUMENTS,
    }

    def __init__(
        self,
        input_dim: int,
        n_codes: int,
        codebook_dim: int,
        beta: float = 1.0,
        output_dim: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Draw the codebook as `VectorQuantizer` and the projections as torch's layers do.

        Args:
            input_dim: C, the channels of the input.
            n_codes: K, the number of codes.
            codebook_dim: D, the width of a code.
            beta: weight of the commitment loss.
            output_dim: channels of the output; None: D, without a projection.
            **kwargs: further arguments of `VectorQuantizer`.

        Raises:
            InvalidArgument: an argument or the remap is not valid; see `AbstractQuantizer`.
        """
        super().__init__(n_codes, codebook_dim, beta, **kwargs)
        check_size("input_dim", input_dim)
        self.input_dim = int(input_dim)
        self.proj_in = projection("input_dim", input_dim, codebook_dim)
        self.proj_out = projection("output_dim", codebook_dim, output_dim)
        if output_dim is not None:
            self.output_dim = int(output_dim)

    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Project in, quantize, project out.

        The loss and the straight-through gradient are computed in the codes' space, on the layer's own projection. In
        training that projection is searched, too; in eval the exact projection, rounded once to float32, as in
        `encode`.

        Args:
            z: (b, C, h, w), (b, C, t, h, w), (b, s, C) or (n, C), floating point; NaN is not checked for.

        Returns:
            z_q, contiguous: with an output_dim in z's layout, without one (b, tokens, D) for 4 and 5 axes; in the type
            that the layers give. And a dict as in `VectorQuantizer.forward`.

        Raises:
            InvalidShape: another rank or channel count, or no tokens.
            InvalidDtype: z is not floating point.
        """
        grid = grid_of(z, self.input_dim, self.layout)
        check_not_empty(grid)
        rows = to_rows(z, self.layout)
        searched = None if self.training else self._searched_in_eval(rows)
        z_q, info = self._quantized(apply_layer(self.proj_in, rows), grid, searched)
        if isinstance(self.proj_out, nn.Identity):
            # The original's layout, which decode does not share.
            return (z_q if len(grid) == 1 else rearrange(z_q, "(b s) d -> b s d", b=grid[0])), info
        return from_rows(apply_layer(self.proj_out, z_q), grid, self.layout), info

    @torch.no_grad()
    def _searched_in_eval(self, rows: Tensor) -> Tensor | None:
        try:
            operands = self.input_projection()
        except CodebookError:
            # A projection that has diverged has no exact values: forward goes on with the layer's own.
            return None
        if operands is None:
            return None
        # Rows that are not finite get some code, as everywhere in forward: the exact projection takes finite ones.
        is_finite = torch.isfinite(rows).all(dim=1, keepdim=True)
        with autocast_off(rows.device):
            return affine(widen(torch.where(is_finite, rows, 0)), *operands)
