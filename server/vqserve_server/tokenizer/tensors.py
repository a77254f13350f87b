"""The caller's tensors: checked, flattened, encoded or decoded; answers are tensors on their device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vqserve import dtypes
from vqserve.codebook_info import CodebookInfo
from vqserve.errors import rows_placed
from vqserve.layout import Layout, channel_axis, grid_shape
from vqserve.validation import beyond_dtype, not_dense, not_latents
from vqserve_server.device import to_host
from vqserve_server.quantizers import tensors
from vqserve_server.quantizers.inference.on_device import OnDevice
from vqserve_server.quantizers.inference.served import Served
from vqserve_server.rows import from_rows, to_rows
from vqserve_server.tokenizer.arrays import Options, as_tokens, layout_of_indices, layout_of_latents, used_indices


@dataclass(frozen=True)
class GivenTensor:
    """The caller's tensor, validated for a codebook; see `GivenArray`.

    Attributes:
        device: the tensor's.
    """

    tokens: Tensor
    grid: tuple[int, ...]
    layout: Layout
    device: torch.device
    batched: bool = True

    def encoded(self, served: Served, asked: Options, *, info: CodebookInfo) -> Tensor:
        """Return the indices of latents, int64; see `GivenArray.encoded`."""
        with rows_placed(self.grid):
            found = _encode(served, self.tokens, asked)
        indices = from_rows(found, self.grid, self.layout) if info.has_stages else found.reshape(self.grid)
        return self._of_caller(indices)

    def decoded(self, served: Served, asked: Options) -> Tensor:
        """Return the latents of indices, in the resolved layout and the requested type; see `GivenArray.decoded`."""
        dtype: torch.dtype = getattr(torch, asked.dtype.name)
        rows = _decode(served, self.tokens, asked, dtype)
        narrowed = tensors.narrow(rows, dtype)
        if narrowed.dtype.itemsize < rows.dtype.itemsize:
            overflowed = ~tensors.is_finite(narrowed).all(dim=1)
            if bool(overflowed.any()):
                row, has_stages = int(torch.nonzero(overflowed)[0, 0]), self.tokens.ndim > 1
                raise beyond_dtype(row, asked.dtype.name, has_stages=has_stages).placed(self.grid)
        return self._of_caller(from_rows(narrowed, self.grid, self.layout))

    def _of_caller(self, answer: Tensor) -> Tensor:
        return (answer if self.batched else answer.squeeze(0)).to(self.device)


def _encode(served: Served, rows: Tensor, asked: Options) -> Tensor:
    if isinstance(served, OnDevice):
        return served.frozen.encode_rows(rows.to(served.frozen.device), num_quantizers=asked.num_quantizers)
    return torch.from_numpy(served.encode_rows(to_host(rows).numpy(), num_quantizers=asked.num_quantizers))


def _decode(served: Served, indices: Tensor, asked: Options, dtype: torch.dtype) -> Tensor:
    if isinstance(served, OnDevice):
        return served.frozen.decode_rows(indices.to(served.frozen.device), output=asked.output, dtype=dtype)
    rows = served.decode_rows(to_host(indices).numpy(), output=asked.output, dtype=asked.dtype.storage)
    name = asked.dtype.name if rows.dtype == asked.dtype.storage else rows.dtype.name
    found: Tensor = dtypes.to_torch(rows, name)
    return found


def given_latents(latents: Tensor, asked: Options, *, info: CodebookInfo) -> GivenTensor:
    """Return latents that the codebook takes; see `arrays.given_latents`."""
    _check_dense(latents, "latents")
    dtype = dtypes.of_torch(latents.dtype)
    if dtype is None or dtype not in dtypes.LATENTS:
        raise not_latents(latents.dtype)
    if not asked.batched:
        latents = latents[None]
    layout = layout_of_latents(latents.shape, asked, info)
    wide = latents.detach().to(getattr(torch, dtype.computed.name))
    tensors.check_finite(wide)
    # numpy refuses a negation that torch has postponed.
    rows = to_rows(wide, layout).resolve_neg().contiguous()
    return GivenTensor(rows, grid_shape(latents.shape, layout), layout, latents.device, asked.batched)


def given_indices(indices: Tensor, asked: Options, *, info: CodebookInfo, decodable: int) -> GivenTensor:
    """Return indices that the codebook decodes; see `arrays.given_indices`."""
    _check_dense(indices, "indices")
    tensors.check_integers(indices)
    if not asked.batched:
        indices = indices[None]
    layout = layout_of_indices(indices.shape, asked, info)
    used = used_indices(indices.detach(), layout, asked, info)
    ids = tensors.checked_indices(used, decodable, info.stage_vocab_sizes, channel_axis(layout))
    return GivenTensor(*as_tokens(ids, layout, info), layout, indices.device, asked.batched)


def _check_dense(tensor: Tensor, what: str) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise not_dense(what, dtype=tensor.dtype, layout=tensor.layout, device=tensor.device)
