"""The caller's options and arrays, numpy or torch: checked, flattened, encoded or decoded; answers in their kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqserve import dtypes
from vqserve.codebook_info import CodebookInfo
from vqserve.errors import rows_placed
from vqserve.layout import Layout, channel_axis, first_channels, grid_shape, parse_layout, warn_of_an_image
from vqserve.types import OutputName
from vqserve.validation import (
    beyond_dtype,
    check_batched,
    check_call,
    check_has_output,
    check_indices,
    check_indices_shape,
    check_latents_shape,
    check_num_quantizers,
    check_output,
    not_an_array,
    not_dense,
    not_indices,
    not_latents,
    not_several,
)
from vqserve_server.device import to_device
from vqserve_server.quantizers import tensors
from vqserve_server.quantizers.inference.base import FrozenQuantizer
from vqserve_server.rows import from_rows, to_rows
from vqserve_server.validation import check_finite

T = TypeVar("T")
Indices = TypeVar("Indices", npt.NDArray[Any], Tensor)

# By how latents are stored.
TORCH_DTYPES: dict[np.dtype[Any], torch.dtype] = {dtype.storage: getattr(torch, dtype.name) for dtype in dtypes.LATENTS}


@dataclass(frozen=True)
class Options:
    """The validated options of a call, so that `encode_many` rejects invalid options before it begins."""

    layout: Layout | None
    dtype: torch.dtype
    output: OutputName
    num_quantizers: int
    codebook: str | None
    digest: str | None
    batched: bool


def options(
    info: CodebookInfo,
    codebook: str | None = None,
    digest: str | None = None,
    timeout: float | None = None,
    *,
    layout: str | None = None,
    dtype: Any = "float32",
    output: str = "latents",
    num_quantizers: int | None = None,
    batched: bool = True,
) -> Options:
    """Return the options of a call.

    Raises:
        InvalidOption: a value is not one of an option's values, or the codebook cannot give it.
        TypeError: codebook, digest, timeout or batched is of another type.
    """
    check_output(output)
    check_batched(batched)
    check_call(codebook=codebook, digest=digest, timeout=timeout)
    check_has_output(output, info=info)
    count = check_num_quantizers(num_quantizers, available=info.num_quantizers)
    wanted: OutputName = "code_rows" if output == "code_rows" else "latents"
    torch_dtype = getattr(torch, dtypes.latent_dtype_name(dtype))
    return Options(parse_layout(layout), torch_dtype, wanted, count, codebook, digest, batched)


@dataclass(frozen=True)
class Given:
    """The caller's array, validated for a codebook.

    Attributes:
        tokens: latents as (n, input_dim) float32 or float64, finite, in C order; indices as int64, in range: (n,), of a
            residual codebook (n, q), those of them that are requested.
        grid: shape of the tokens in the caller's array, with its batch axis or the one that was added to it.
        layout: layout of the latents, given or requested.
        device: the tensor's; None for numpy.
        batched: False: a batch axis was added, and is not in answers.
    """

    tokens: Tensor
    grid: tuple[int, ...]
    layout: Layout
    device: torch.device | None = None
    batched: bool = True

    def indices(self, indices: Tensor, *, vocab_size: int) -> Any:
        """Return indices as the caller's kind: torch int64, numpy of the smallest type that holds the vocabulary."""
        indices = self._of_caller(indices)
        if self.device is not None:
            return indices.to(self.device)
        return indices.cpu().numpy().astype(dtypes.smallest_unsigned(vocab_size))

    def latents(self, latents: Tensor) -> Any:
        """Return latents as the caller's kind; float32 holds the values of types that numpy lacks."""
        latents = self._of_caller(latents)
        if self.device is not None:
            return latents.to(self.device)
        dtype = dtypes.of_torch(latents.dtype)
        return (latents if dtype is None or dtype.coding is None else latents.float()).cpu().numpy()

    def _of_caller(self, answer: Tensor) -> Tensor:
        return answer if self.batched else answer.squeeze(0)


def several(items: T, verb: str) -> T:
    """Return what `encode_many` or `decode_many` was given.

    Raises:
        NotAnArray: it is one array, whose first axis would be taken apart.
    """
    if isinstance(items, np.ndarray | Tensor):
        raise not_several(verb)
    return items


def given_latents(latents: object, asked: Options, *, info: CodebookInfo) -> Given:
    """Return latents that the codebook takes.

    Raises:
        NotAnArray: they are neither a numpy array nor a dense torch tensor.
        InvalidDtype: their elements are not float16, bfloat16, float32 or float64.
        InvalidShape: the rank or the channel count is not the codebook's.
        NonFiniteLatents: names the position of a NaN or an infinity.
    """
    if isinstance(latents, Tensor):
        _check_dense(latents, "latents")
        dtype = dtypes.of_torch(latents.dtype)
        if dtype is None or dtype not in dtypes.LATENTS:
            raise not_latents(latents.dtype)
        if not asked.batched:
            latents = latents[None]
        resolved = _layout(latents.shape, asked, info)
        wide = latents.detach().to(getattr(torch, dtype.computed.name))
        tensors.check_finite(wide)
        rows, grid = to_rows(wide, resolved).contiguous(), grid_shape(latents.shape, resolved)
        return Given(rows, grid, resolved, latents.device, asked.batched)
    array = _plain_array(latents, "latents")
    if dtypes.of_numpy(array.dtype) not in dtypes.LATENTS:
        raise not_latents(array.dtype)
    if not asked.batched:
        array = array[None]
    resolved = _layout(array.shape, asked, info)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    check_finite(array)
    flat = to_rows(array, resolved)
    wide = to_device(np.ascontiguousarray(flat, np.result_type(flat, np.float32)), torch.device("cpu"))
    return Given(wide, grid_shape(array.shape, resolved), resolved, batched=asked.batched)


def _layout(shape: Sequence[int], asked: Options, info: CodebookInfo) -> Layout:
    resolved = check_latents_shape(shape, asked.layout, info=info, batched=asked.batched)
    if asked.batched:
        warn_of_an_image(shape, asked.layout, info.layout)
    return resolved


def given_indices(indices: object, asked: Options, *, info: CodebookInfo, decodable: int) -> Given:
    """Return indices that the codebook decodes.

    Raises:
        NotAnArray: they are neither a numpy array nor a dense torch tensor.
        InvalidDtype: their elements are no integers.
        InvalidShape: the rank, or the number of indices for a token, is not the codebook's.
        IndexOutOfRange: names the position, the value and the range.
    """
    if isinstance(indices, Tensor):
        _check_dense(indices, "indices")
        tensors.check_integers(indices)
        if not asked.batched:
            indices = indices[None]
        layout = _layout_of_indices(indices.shape, asked, info)
        used_ids = _used(indices.detach(), layout, asked, info)
        axis = channel_axis(layout)
        ids = tensors.checked_indices(used_ids, decodable, info.stage_vocab_sizes, axis)
        device: torch.device | None = indices.device
    else:
        array = _plain_array(indices, "indices")
        if array.dtype.kind not in "iu":
            raise not_indices(array.dtype)
        if not asked.batched:
            array = array[None]
        layout = _layout_of_indices(array.shape, asked, info)
        used = _used(array, layout, asked, info)
        check_indices(used, decodable=decodable, stage_sizes=info.stage_vocab_sizes, axis=channel_axis(layout))
        ids, device = torch.from_numpy(used.astype(np.int64)), None
    if not info.has_stages:
        return Given(ids.reshape(-1), tuple(ids.shape), layout, device, asked.batched)
    grid = grid_shape(ids.shape, layout)
    return Given(to_rows(ids, layout), grid, layout, device, asked.batched)


def encode_grid(frozen: FrozenQuantizer, latents: Given, asked: Options, *, has_stages: bool) -> Tensor:
    """Return the indices of latents in their grid, int64 on the codebook's device.

    Args:
        frozen: the codebook.
        latents: the array to encode.
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
    """Decode indices, in the resolved layout, on the codebook's device.

    Raises:
        InvalidOption: names an index with a value beyond the range of the requested type.
    """
    rows = frozen.decode_rows(indices.tokens.to(frozen.device), output=asked.output, dtype=asked.dtype)
    narrowed = tensors.narrow(rows, asked.dtype)
    if narrowed.dtype.itemsize < rows.dtype.itemsize:
        overflowed = ~tensors.is_finite(narrowed).all(dim=1)
        if bool(overflowed.any()):
            row, dtype = int(torch.nonzero(overflowed)[0, 0]), str(asked.dtype).removeprefix("torch.")
            raise beyond_dtype(row, dtype, has_stages=indices.tokens.ndim > 1).placed(indices.grid)
    return from_rows(narrowed, indices.grid, indices.layout)


def _layout_of_indices(shape: Sequence[int], asked: Options, info: CodebookInfo) -> Layout:
    return check_indices_shape(
        shape, asked.layout, info=info, num_quantizers=asked.num_quantizers, batched=asked.batched
    )


def _used(indices: Indices, layout: Layout, asked: Options, info: CodebookInfo) -> Indices:
    """Return the requested indices of each token."""
    return indices[first_channels(asked.num_quantizers, layout)] if info.has_stages else indices


def _plain_array(value: object, what: str) -> npt.NDArray[Any]:
    # A masked array's mask would be lost.
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
        raise not_an_array(what, value)
    return np.asarray(value)


def _check_dense(tensor: Tensor, what: str) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise not_dense(what, dtype=tensor.dtype, layout=tensor.layout, device=tensor.device)
