"""Quantizers whose codebook is a grid: every channel has a few values of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vqserve.errors import rows_placed
from vqserve.validation import check_indices_rank
from vqserve_server.errors import InvalidOption
from vqserve_server.quantizers.checks import check_finite, checked_indices
from vqserve_server.quantizers.dtypes import widen
from vqserve_server.quantizers.frozen import freeze
from vqserve_server.quantizers.frozen_scalar import Channel, FrozenScalar
from vqserve_server.quantizers.projections import ProjectedModule, projection
from vqserve_server.quantizers.quantizer import Quantizer
from vqserve_server.quantizers.rows import from_rows, grid_of, grid_of_entries, to_rows

# What an index of 32 bits can name.
MAX_CODES = 1 << 32


class ScalarQuantizer(ProjectedModule, Quantizer):
    """One index for the digits of D channels. Inference only: there is no `forward`, and nothing is searched.

    State: none but the tensors of `ProjectedModule`, for the projections that there are.
    """

    def __init__(self, levels: Sequence[int], input_dim: int | None, output_dim: int | None) -> None:
        """Draw the projections as torch's layers do; a state dict is to follow.

        Args:
            levels: of each of the D channels, how many values it has.
            input_dim: channels that are projected to D before the rounding; None: D, without a projection.
            output_dim: channels that codes are projected to when they are decoded; None: D, without a projection.

        Raises:
            InvalidOption: the values' combinations are more than an index can name, or a width is none.
        """
        super().__init__()
        # Python's integers cannot overflow.
        self.num_codes = int(np.prod([int(level) for level in levels], dtype=object))
        if self.num_codes > MAX_CODES:
            raise InvalidOption(f"{self.num_codes} codes are more than an index of 32 bits can name")
        self.code_dim = len(levels)
        self.input_dim = self.code_dim if input_dim is None else input_dim
        self.output_dim = self.code_dim if output_dim is None else output_dim
        self.proj_in = projection("input_dim", input_dim, self.code_dim)
        self.proj_out = projection("output_dim", self.code_dim, output_dim)

    @abstractmethod
    def channels(self) -> list[Channel]:
        """Return what becomes of each of the D channels."""

    @property
    def weight_dtype(self) -> torch.dtype:
        """The type that decode returns: the projections', and float32 without any."""
        return next((parameter.dtype for parameter in self.parameters()), torch.float32)

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """Return the index of every token, exact and the same on every device.

        Args:
            z: (b, C, h, w), (b, C, t, h, w), (b, s, C) or (n, C), C = input_dim, or as `layout` says; floating point.

        Returns:
            int64 indices over the grid: (b, h, w), (b, t, h, w), (b, s) or (n,).

        Raises:
            InvalidShape: another rank or channel count.
            InvalidDtype: z is not floating point.
            NonFiniteLatents: z holds NaN or infinity, or a projection leaves float32's range; names the position.
            CodebookError: a projection holds NaN or infinity.
        """
        grid = grid_of(z, self.input_dim, self.layout)
        check_finite(z)
        rows = widen(to_rows(z, self.layout))
        with rows_placed(grid):
            return freeze(self, device=z.device).encode_rows(rows).reshape(grid)

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Return the latents of indices.

        Args:
            indices: (b, h, w), (b, t, h, w), (b, s) or (n,), any integer type, in [0, num_codes).

        Returns:
            (b, C, h, w), (b, C, t, h, w), (b, s, C) or (n, C), C = output_dim, or as `layout` says; contiguous.

        Raises:
            InvalidShape: the indices have not 1 to 4 axes.
            InvalidDtype: they are not integers.
            IndexOutOfRange: one is out of range; names the position.
        """
        check_indices_rank(indices.ndim)
        ids = checked_indices(indices, self.num_codes).reshape(-1)
        return from_rows(freeze(self, device=ids.device).decode_rows(ids), indices.shape, self.layout)

    @torch.no_grad()
    def get_codebook_entry(self, indices: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Return the codes of indices before any projection; see `AbstractQuantizer.get_codebook_entry`.

        Args:
            indices: any shape and integer type, in [0, num_codes).
            shape: channel-last shape of 2 to 5 axes that the result is laid out from; None: indices' shape.

        Returns:
            (*indices.shape, D), or as `shape` says.

        Raises:
            InvalidShape: `shape` does not end in D, or holds another number of tokens than there are indices.
            InvalidDtype: the indices are not integers.
            IndexOutOfRange: one is out of range; names the position.
        """
        grid = None if shape is None else grid_of_entries(shape, width=self.code_dim, count=indices.numel())
        ids = checked_indices(indices, self.num_codes)
        rows = freeze(self, device=ids.device).decode_rows(ids.reshape(-1), output="code_rows")
        return rows.reshape(*ids.shape, self.code_dim) if grid is None else from_rows(rows, grid, self.layout)

    def frozen(self, device: torch.device, search: str = "auto") -> FrozenScalar:
        """Return the form that serves; see `Quantizer.frozen`."""
        return FrozenScalar.of(
            self.channels(),
            **self.sizes(device),
            search=search,
            projections=(self.input_projection(), self.output_projection()),
        )
