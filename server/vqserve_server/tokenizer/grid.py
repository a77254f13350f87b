"""What a frozen codebook makes of a grid of tokens; errors name the position in the grid."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vqserve.layout import channel_axis
from vqserve_server.codebooks.narrowing import narrow
from vqserve_server.errors import CodebookError, InvalidOption, NonFiniteLatents
from vqserve_server.quantizers.frozen import FrozenQuantizer
from vqserve_server.tokenizer.arrays import Given
from vqserve_server.tokenizer.options import Options

_ELEMENTS_PER_CHUNK = 1 << 22


def encode_grid(frozen: FrozenQuantizer, latents: Given) -> Tensor:
    """Return the indices of latents in their grid, int64 on the codebook's device.

    Raises:
        NonFiniteLatents: names a token whose projection overflows.
    """
    rows = latents.tokens.to(frozen.device)
    try:
        return frozen.encode_rows(rows).reshape(latents.grid)
    except NonFiniteLatents:
        # A projection overflowed. The frozen quantizer knows rows: the caller knows the grid.
        position = _position(_first_overflow(frozen, rows), latents.grid)
        raise NonFiniteLatents(f"the projection of token {position} leaves the range of float32") from None


def decode_grid(frozen: FrozenQuantizer, indices: Given, asked: Options) -> Tensor:
    """Return what indices stand for, in the layout that was resolved, on the codebook's device.

    Raises:
        InvalidOption: names an index with a value beyond the range of the type that is asked for.
    """
    rows = frozen.decode_rows(indices.tokens.to(frozen.device), output=asked.output)
    narrowed = narrow(rows, asked.dtype)
    if narrowed.dtype.itemsize < rows.dtype.itemsize:
        overflowed = ~torch.isfinite(narrowed).all(dim=1)
        if bool(overflowed.any()):
            position = _position(int(torch.nonzero(overflowed)[0, 0]), indices.grid)
            raise InvalidOption(
                f"indices{position} decodes to a value beyond the range of "
                f"{str(asked.dtype).removeprefix('torch.')}: take a wider dtype"
            )
    latents = narrowed.reshape(*indices.grid, rows.shape[1])
    return latents.movedim(-1, channel_axis(indices.layout)).contiguous()


def check_table(frozen: FrozenQuantizer) -> None:
    """Refuse a codebook that decodes to NaN or infinity: its weights are finite, their projection need not be.

    Raises:
        CodebookError: names the first such index.
    """
    step = max(1, _ELEMENTS_PER_CHUNK // frozen.output_dim)
    for start in range(0, frozen.decodable, step):
        ids = torch.arange(start, min(start + step, frozen.decodable), device=frozen.device)
        finite = torch.isfinite(frozen.decode_rows(ids, output="latents")).all(dim=1)
        if not bool(finite.all()):
            first = start + int(torch.nonzero(~finite)[0, 0])
            raise CodebookError(f"the output projection takes index {first} beyond float32's range")


def _first_overflow(frozen: FrozenQuantizer, rows: Tensor) -> int:
    start, stop = 0, rows.shape[0]
    while stop - start > 1:
        middle = (start + stop) // 2
        try:
            frozen.encode_rows(rows[start:middle])
            start = middle
        except NonFiniteLatents:
            stop = middle
    return start


def _position(row: int, grid: tuple[int, ...]) -> list[int]:
    return [int(i) for i in np.unravel_index(row, grid)]
