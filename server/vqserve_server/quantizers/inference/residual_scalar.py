"""Grids of values that refine each other, prepared for serving: every stage rounds what those before it left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vqserve.errors import CodebookError
from vqserve_server.quantizers.inference.first_bound import FirstBound
from vqserve_server.quantizers.inference.residual import Part
from vqserve_server.quantizers.inference.scalar import FrozenScalar
from vqserve_server.quantizers.inference.staged import FrozenStages
from vqserve_server.quantizers.projections import Projection, largest_projected, project
from vqserve_server.search.rounding import affine


@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenScalarPart:
    """One chain of stages.

    Attributes:
        part: its channels of the latents, and its places among a token's indices.
        stages: grids without projections, in order.
        first_bound: before the first stage; None: there is none.
        projection: before that; None: there is none.
        output_projection: of the sum of the stages; None: there is none.
    """

    part: Part
    stages: tuple[FrozenScalar, ...]
    first_bound: FirstBound | None
    projection: Projection | None
    output_projection: Projection | None

    @property
    def width(self) -> int:
        """Channels that are decoded."""
        return self.stages[0].code_dim if self.output_projection is None else len(self.output_projection[0])

    def encode(self, rows: Tensor, out: Tensor) -> None:
        """Write the indices of rows (n, C) to their places in `out` (n, q), as far as it has them."""
        count = self.part.stages_within(out.shape[1])
        if count == 0:
            return
        residual = project(rows[:, self.part.start : self.part.stop].contiguous(), self.projection)
        if self.first_bound is not None:
            residual = self.first_bound(residual)
        for number, stage in enumerate(self.stages[:count]):
            digits = stage.digits(residual)
            out[:, self.part.places[number]] = stage.indices_of(digits)
            if number + 1 < count:
                # One float32 subtraction (float64 where the latents are): defined, not approximated.
                residual = residual - stage.values_of(digits)

    def decode(self, indices: Tensor) -> Tensor:
        """Return the part's rows (n, width) float32 of indices (n, q); of zeros if they are none of its."""
        count = self.part.stages_within(indices.shape[1])
        if count == 0:
            return torch.zeros(len(indices), self.width, dtype=torch.float32, device=indices.device)
        first, *rest = (
            stage.decode_rows(indices[:, place])
            for stage, place in zip(self.stages[:count], self.part.places[:count], strict=True)
        )
        total = first
        for values in rest:
            total = total + values
        return total if self.output_projection is None else affine(total, *self.output_projection)

    def check_outputs(self) -> None:
        """Reject an output projection that may leave float32's range.

        Raises:
            CodebookError: it may.
        """
        largest = torch.stack([stage.largest_values() for stage in self.stages]).sum(dim=0)
        if not bool((largest_projected(largest, self.output_projection) < torch.finfo(torch.float32).max).all()):
            raise CodebookError("the output projection may take codes beyond float32's range")


@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenResidualScalar(FrozenStages):
    """Parts that have channels of their own, side by side."""

    _parts: Sequence[FrozenScalarPart]

    @property
    def search_backend(self) -> str:
        """No search."""
        return "none"

    def _decoded(self, indices: Tensor) -> Tensor:
        return torch.cat([part.decode(indices) for part in self._parts], dim=1)
