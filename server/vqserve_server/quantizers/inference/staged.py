"""Chains of stages prepared for serving: what those with codebooks and those on grids share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vqserve.errors import CodebookError, InvalidOption
from vqserve.types import OutputName
from vqserve.validation import check_output
from vqserve_server.quantizers.inference.base import FrozenQuantizer
from vqserve_server.quantizers.tensors import autocast_off


class Chain(Protocol):
    """One chain of stages."""

    @property
    def stages(self) -> Sequence[FrozenQuantizer]:
        """The stages, in order."""

    def encode(self, rows: Tensor, out: Tensor) -> None:
        """Write the indices of rows (n, C) to their places in `out` (n, q), as far as it has them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenStages(FrozenQuantizer):
    """Chains of stages that share the indices of a token."""

    _parts: Sequence[Chain]

    @torch.no_grad()
    def encode_rows(self, rows: Tensor, *, num_quantizers: int | None = None) -> Tensor:
        """Return the indices (n, num_quantizers) of every row; see `FrozenQuantizer.encode_rows`."""
        count = self.num_quantizers if num_quantizers is None else num_quantizers
        out = torch.empty(rows.shape[0], count, dtype=torch.int64, device=rows.device)
        with autocast_off(self.device):
            for part in self._parts:
                part.encode(rows, out)
        return out

    @torch.no_grad()
    def decode_rows(
        self, indices: Tensor, *, output: OutputName = "latents", dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return the row of every token's first q indices (n, q), in order; see `FrozenQuantizer.decode_rows`."""
        check_output(output)
        if output == "code_rows":
            raise InvalidOption(
                "a residual codebook has a code row for each index, and none for a token: take latents", option="output"
            )
        with autocast_off(self.device):
            return self._decoded(indices).to(self.weight_dtype)

    @abstractmethod
    def _decoded(self, indices: Tensor) -> Tensor:
        """Return the rows (n, output_dim) of indices (n, q), in any floating-point type."""

    @torch.no_grad()
    def check_itself(self) -> None:
        """Check every stage; see `FrozenQuantizer.check_itself`.

        Raises:
            CodebookError: names the part and the stage.
        """
        for number, part in enumerate(self._parts):
            for stage, of_stage in enumerate(part.stages):
                try:
                    of_stage.check_itself()
                except CodebookError as error:
                    raise CodebookError(f"part {number}, stage {stage}: {error}") from None
