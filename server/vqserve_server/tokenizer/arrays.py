"""The caller's options and numpy arrays: checked, flattened, encoded or decoded.

`tensors` has the same for torch, which is imported only for a caller that has a tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import numpy as np
import numpy.typing as npt

from vqserve import dtypes
from vqserve.codebook_info import CodebookInfo
from vqserve.dtypes import DType
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
    not_indices,
    not_latents,
    not_several,
)
from vqserve_server.quantizers.inference.served import Served
from vqserve_server.rows import ArrayOrTensor, from_rows, to_rows
from vqserve_server.validation import check_finite

if TYPE_CHECKING:
    from torch import Tensor

    from vqserve_server.tokenizer.tensors import GivenTensor

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """The validated options of a call, so that `encode_many` rejects invalid options before it begins."""

    layout: Layout | None
    dtype: DType
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
    element = dtypes.BY_NAME[dtypes.latent_dtype_name(dtype)]
    return Options(parse_layout(layout), element, wanted, count, codebook, digest, batched)


@dataclass(frozen=True)
class GivenArray:
    """The caller's array, validated for a codebook.

    Attributes:
        tokens: latents as (n, input_dim) float32 or float64, finite, in C order; indices as int64, in range: (n,), of a
            residual codebook (n, q), those of them that are requested.
        grid: shape of the tokens in the caller's array, with its batch axis or the one that was added to it.
        layout: layout of the latents, given or requested.
        batched: False: a batch axis was added, and is not in answers.
    """

    tokens: npt.NDArray[Any]
    grid: tuple[int, ...]
    layout: Layout
    batched: bool = True

    def encoded(self, served: Served, asked: Options, *, info: CodebookInfo) -> npt.NDArray[Any]:
        """Return the indices of latents, of the smallest type that holds the vocabulary.

        Raises:
            NonFiniteLatents: names a token that leaves float32's range on its way to the codes.
        """
        with rows_placed(self.grid):
            found = served.encode_rows(self.tokens, num_quantizers=asked.num_quantizers)
        indices = from_rows(found, self.grid, self.layout) if info.has_stages else found.reshape(self.grid)
        return self._of_caller(indices.astype(dtypes.smallest_unsigned(info.vocab_size)))

    def decoded(self, served: Served, asked: Options) -> npt.NDArray[Any]:
        """Return the latents of indices, in the resolved layout; float32 holds the values of types that numpy lacks.

        Raises:
            InvalidOption: names an index with a value beyond the range of the requested type.
        """
        rows = served.decode_rows(self.tokens, output=asked.output, dtype=asked.dtype.storage)
        if rows.dtype != asked.dtype.storage:
            overflowed = (np.abs(rows) >= asked.dtype.overflow).any(axis=1)
            if overflowed.any():
                row, has_stages = int(overflowed.argmax()), self.tokens.ndim > 1
                raise beyond_dtype(row, asked.dtype.name, has_stages=has_stages).placed(self.grid)
            with np.errstate(under="ignore"):
                rows = asked.dtype.narrow(rows)
        return self._of_caller(from_rows(asked.dtype.widen(rows), self.grid, self.layout))

    def _of_caller(self, answer: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return answer if self.batched else answer.squeeze(0)


def several(items: T, verb: str) -> T:
    """Return what `encode_many` or `decode_many` was given.

    Raises:
        NotAnArray: it is one array, whose first axis would be taken apart.
    """
    if isinstance(items, np.ndarray) or is_tensor(items):
        raise not_several(verb)
    return items


def is_tensor(value: object) -> TypeGuard[Tensor]:
    """Return whether a value is a tensor, without importing torch: whoever has one has imported it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def given_latents(latents: object, asked: Options, *, info: CodebookInfo) -> GivenArray | GivenTensor:
    """Return latents that the codebook takes.

    Raises:
        NotAnArray: they are neither a numpy array nor a dense torch tensor.
        InvalidDtype: their elements are not float16, bfloat16, float32 or float64.
        InvalidShape: the rank or the channel count is not the codebook's.
        NonFiniteLatents: names the position of a NaN or an infinity.
    """
    if is_tensor(latents):
        from vqserve_server.tokenizer import tensors  # noqa: PLC0415

        return tensors.given_latents(latents, asked, info=info)
    array = _plain_array(latents, "latents")
    if dtypes.of_numpy(array.dtype) not in dtypes.LATENTS:
        raise not_latents(array.dtype)
    if not asked.batched:
        array = array[None]
    layout = layout_of_latents(array.shape, asked, info)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    check_finite(array)
    flat = to_rows(array, layout)
    rows = np.ascontiguousarray(flat, np.result_type(flat, np.float32))
    return GivenArray(rows, grid_shape(array.shape, layout), layout, asked.batched)


def layout_of_latents(shape: Sequence[int], asked: Options, info: CodebookInfo) -> Layout:
    """Return the layout of latents, checked with their shape."""
    resolved = check_latents_shape(shape, asked.layout, info=info, batched=asked.batched)
    if asked.batched:
        warn_of_an_image(shape, asked.layout, info.layout)
    return resolved


def given_indices(indices: object, asked: Options, *, info: CodebookInfo, decodable: int) -> GivenArray | GivenTensor:
    """Return indices that the codebook decodes.

    Raises:
        NotAnArray: they are neither a numpy array nor a dense torch tensor.
        InvalidDtype: their elements are no integers.
        InvalidShape: the rank, or the number of indices for a token, is not the codebook's.
        IndexOutOfRange: names the position, the value and the range.
    """
    if is_tensor(indices):
        from vqserve_server.tokenizer import tensors  # noqa: PLC0415

        return tensors.given_indices(indices, asked, info=info, decodable=decodable)
    array = _plain_array(indices, "indices")
    if array.dtype.kind not in "iu":
        raise not_indices(array.dtype)
    if not asked.batched:
        array = array[None]
    layout = layout_of_indices(array.shape, asked, info)
    used = used_indices(array, layout, asked, info)
    check_indices(used, decodable=decodable, stage_sizes=info.stage_vocab_sizes, axis=channel_axis(layout))
    return GivenArray(*as_tokens(used.astype(np.int64), layout, info), layout, asked.batched)


def as_tokens(indices: ArrayOrTensor, layout: Layout, info: CodebookInfo) -> tuple[ArrayOrTensor, tuple[int, ...]]:
    """Return indices as tokens, and the shape of their grid."""
    if not info.has_stages:
        return indices.reshape(-1), tuple(indices.shape)
    return to_rows(indices, layout), grid_shape(indices.shape, layout)


def layout_of_indices(shape: Sequence[int], asked: Options, info: CodebookInfo) -> Layout:
    """Return the layout of indices, checked with their shape."""
    return check_indices_shape(
        shape, asked.layout, info=info, num_quantizers=asked.num_quantizers, batched=asked.batched
    )


def used_indices(indices: ArrayOrTensor, layout: Layout, asked: Options, info: CodebookInfo) -> ArrayOrTensor:
    """Return the requested indices of each token."""
    return indices[first_channels(asked.num_quantizers, layout)] if info.has_stages else indices


def _plain_array(value: object, what: str) -> npt.NDArray[Any]:
    # A masked array's mask would be lost.
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
        raise not_an_array(what, value)
    return np.asarray(value)
