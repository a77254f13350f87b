"""What a frozen codebook makes of a grid of tokens; errors name the position in the grid."""

from __future__ import annotations

import torch
from torch import Tensor

from vqserve.errors import rows_placed
from vqserve.validation import beyond_dtype
from vqserve_server.quantizers.inference.base import FrozenQuantizer
from vqserve_server.quantizers.table import narrow
from vqserve_server.rows import from_rows
from vqserve_server.tokenizer.arrays import Given
from vqserve_server.tokenizer.options import Options


def encode_grid(frozen: FrozenQuantizer, latents: Given, asked: Options, *, has_stages: bool) -> Tensor:
    """Return the indices of latents in their grid, int64 on the codebook's device.

    Args:
        frozen: the codebook.
        latents: what is to be encoded.
        asked: how many indices each token is to have, if they have stages.
        has_stages: whether a token's indices are an axis, in the place of the channels.

    Raises:
        NonFiniteLatents: names a token that leaves float32's range on its way to the codes.
    """
    rows = latents.tokens.to(frozen.device)
    with rows_placed(latents.grid):
        indices = frozen.encode_rows(rows, num_quantizers=asked.num_quantizers)
    if not has_stages:
        return indices.reshape(latents.grid)
    return from_rows(indices, latents.grid, latents.layout)


def decode_grid(frozen: FrozenQuantizer, indices: Given, asked: Options) -> Tensor:
    """Return what indices stand for, in the layout that was resolved, on the codebook's device.

    Raises:
        InvalidOption: names an index with a value beyond the range of the type that is asked for.
    """
    rows = frozen.decode_rows(indices.tokens.to(frozen.device), output=asked.output, dtype=asked.dtype)
    narrowed = narrow(rows, asked.dtype)
    if narrowed.dtype.itemsize < rows.dtype.itemsize:
        overflowed = ~torch.isfinite(narrowed).all(dim=1)
        if bool(overflowed.any()):
            row, dtype = int(torch.nonzero(overflowed)[0, 0]), str(asked.dtype).removeprefix("torch.")
            raise beyond_dtype(row, dtype, has_stages=indices.tokens.ndim > 1).placed(indices.grid)
    return from_rows(narrowed, indices.grid, indices.layout)
