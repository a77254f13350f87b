"""Quantizers with several indices for a token, the first of which are the coarsest: encode and decode of an array."""

from __future__ import annotations

import torch
from torch import Tensor

from vqserve.errors import rows_placed
from vqserve.layout import channel_axis, grid_shape
from vqserve.validation import check_num_quantizers, check_stages
from vqserve_server.quantizers.inference.base import freeze
from vqserve_server.quantizers.quantizer import Quantizer
from vqserve_server.quantizers.tensors import (
    check_finite,
    checked_indices,
    from_rows,
    grid_of,
    layout_of,
    to_rows,
    widen,
)


class StagedQuantizer(Quantizer):
    """A token has `num_quantizers` indices, on an axis in the place of the channels. Inference only."""

    @property
    def has_stages(self) -> bool:
        """Indices have an axis for the stages, also for one."""
        return True

    @torch.no_grad()
    def encode(self, z: Tensor, num_quantizers: int | None = None) -> Tensor:
        """Return the indices of every token, stage by stage exact and the same on every device.

        Args:
            z: (b, C, s), (b, C, h, w), (b, C, t, h, w) or (n, C), or as `layout` says; floating point.
            num_quantizers: how many indices of each token, the first ones; None: all.

        Returns:
            int64, n_q in the place of C: (b, n_q, s), (b, n_q, h, w), (b, n_q, t, h, w) or (n, n_q).

        Raises:
            InvalidOption: num_quantizers is not in [1, n_q].
            InvalidShape: another rank or channel count.
            InvalidDtype: z is not floating point.
            NonFiniteLatents: z holds NaN or infinity, or leaves float32's range on its way; names the position.
            CodebookError: a weight or a projection holds NaN or infinity.
        """
        count = check_num_quantizers(num_quantizers, available=self.num_quantizers)
        grid = grid_of(z, self.input_dim, self.layout)
        check_finite(z)
        rows = widen(to_rows(z, self.layout))
        with rows_placed(grid):
            indices = freeze(self, device=z.device).encode_rows(rows, num_quantizers=count)
        return from_rows(indices, grid, self.layout)

    @torch.no_grad()
    def decode(self, indices: Tensor, num_quantizers: int | None = None) -> Tensor:
        """Return the latents of the first indices of every token.

        Args:
            indices: (b, n_q, s), (b, n_q, h, w), (b, n_q, t, h, w) or (n, n_q), or as `layout` says; any integer type,
                in [0, K) of their stage.
            num_quantizers: how many indices of each token to use; the axis may have more, but not more than there are
                stages. None: all stages'.

        Returns:
            C in the place of n_q, contiguous, of the weight's type.

        Raises:
            InvalidOption: num_quantizers is not in [1, n_q].
            InvalidShape: another rank, or another number of indices for a token.
            InvalidDtype: they are not integers.
            IndexOutOfRange: one is out of range; names the position.
        """
        count = check_num_quantizers(num_quantizers, available=self.num_quantizers)
        layout = layout_of(indices.ndim, self.layout)
        check_stages(indices.shape, layout, wanted=count, available=self.num_quantizers)
        ids = checked_indices(indices, self.num_codes, self.stage_vocab_sizes, channel_axis(layout))
        grid = grid_shape(ids.shape, layout)
        rows = freeze(self, device=ids.device).decode_rows(to_rows(ids, self.layout)[:, :count])
        return from_rows(rows, grid, self.layout)
