"""The caller's arrays: numpy or torch in, the same kind out; what their shape means, and how they are cut.

torch is never imported here: a caller that passes a tensor has imported it.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from vqserve import dtypes, payload
from vqserve.codebook_info import CodebookInfo
from vqserve.errors import InvalidDtype, VqserveError
from vqserve.layout import Layout, channel_axis, grid_shape, warn_of_an_image
from vqserve.payload import ENVELOPE_BYTES
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve.validation import (
    check_indices_shape,
    check_latents_shape,
    not_an_array,
    not_dense,
    not_indices,
    not_latents,
    not_several,
)

Array = npt.NDArray[Any]
T = TypeVar("T")
# A part of an array: one slice for each axis.
Cut = tuple[slice, ...]
Geometry = tuple[tuple[int, ...], Layout]
# Up to this size work on an array takes less time than a thread that gives up the interpreter's lock waits to get it
# back where many threads call: numpy gives it up for more than 500 elements.
SMALL_BYTES = 32 << 10


class ArrayInput(NamedTuple):
    """A caller's array, ready to be cut and sent.

    Attributes:
        array: the values, of any strides and byte order; types that numpy lacks as bit patterns.
        dtype: the wire type.
        device: the torch tensor's device; None for numpy.
        batched: False: the caller's array has no batch axis, and one of length 1 was added.
    """

    array: Array
    dtype: int
    device: Any = None
    batched: bool = True

    def with_batch_axis(self) -> ArrayInput:
        """Return an array without a batch axis with one of length 1."""
        return self._replace(array=self.array[None], batched=False)

    def to_caller(self, result: Array, dtype: int) -> Any:
        """Return a finished result as the kind of this array: numpy, or torch on its device; with its axes.

        Args:
            result: the values.
            dtype: their wire type.
        """
        array = result if self.batched else result.reshape(result.shape[1:])
        if self.device is None:
            return array
        # An array of indices for torch is int64, whatever the type on the wire.
        known = dtypes.BY_NUMBER[dtype]
        return dtypes.to_torch(array, known.name if known in dtypes.LATENTS else "int64").to(self.device)

    def of_caller(self, error: VqserveError) -> VqserveError:
        """Return an error with a position in this array as one about the caller's array."""
        return error if self.batched else error.without_batch_axis()

    def joins(self, other: ArrayInput) -> bool:
        """Return whether both can be concatenated along the first axis."""
        mine, theirs = self.array, other.array
        return (
            (self.dtype, mine.dtype, self.device is None) == (other.dtype, theirs.dtype, other.device is None)
            and mine.ndim == theirs.ndim > 0
            and mine.shape[1:] == theirs.shape[1:]
        )


def latents_input(latents: object) -> ArrayInput:
    """Return latents as they are sent.

    Raises:
        NotAnArray: for what is neither a numpy array nor a torch tensor.
        InvalidDtype: for elements that are not float16, bfloat16, float32 or float64.
    """
    return _array_input(latents, "latents", payload.LATENT_DTYPES, not_latents)


def indices_input(indices: object) -> ArrayInput:
    """Return indices as they are sent.

    Raises:
        NotAnArray: for what is neither a numpy array nor a torch tensor.
        InvalidDtype: for elements that are no integers.
    """
    return _array_input(indices, "indices", payload.INDEX_DTYPES, not_indices, _wire_integers)


def iterable_of_arrays(items: T, verb: str) -> T:
    """Return the argument of `encode_many` or `decode_many`.

    Raises:
        NotAnArray: it is one array, which would be iterated along its first axis.
    """
    torch = sys.modules.get("torch")
    if isinstance(items, np.ndarray) or (torch is not None and isinstance(items, torch.Tensor)):
        raise not_several(verb)
    return items


def joined(inputs: Sequence[ArrayInput]) -> ArrayInput:
    """Return arrays that join as one."""
    return inputs[0]._replace(array=np.concatenate([one.array for one in inputs]))


def _array_input(
    value: object,
    what: str,
    allowed: frozenset[int],
    wrong_dtype: Callable[[object], InvalidDtype],
    prepare: Callable[[Array], Array] | None = None,
) -> ArrayInput:
    torch = sys.modules.get("torch")
    dtype: object
    if torch is not None and isinstance(value, torch.Tensor):
        result, dtype = _tensor_input(torch, value, what, prepare), value.dtype
    elif isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray):
        array = np.asarray(value)
        known = dtypes.of_numpy(array.dtype)
        if known is None and prepare is not None:
            array = prepare(array)
        result = ArrayInput(array, _wire_dtype(array) if known is None else known.number)
        dtype = array.dtype
    else:
        raise not_an_array(what, value)
    if result.dtype not in allowed:
        raise wrong_dtype(dtype)
    return result


def _tensor_input(torch: Any, tensor: Any, what: str, prepare: Callable[[Array], Array] | None) -> ArrayInput:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise not_dense(what, dtype=tensor.dtype, layout=tensor.layout, device=tensor.device)
    # A lazily negated tensor has no numpy form; its values have.
    plain = tensor.detach().resolve_conj().resolve_neg().cpu()
    known = dtypes.of_torch(plain.dtype)
    if known is not None:
        return ArrayInput(dtypes.to_numpy(plain), known.number, tensor.device)
    try:
        array = plain.numpy()
    except TypeError:
        # Neither numpy nor the wire has the type.
        return ArrayInput(np.empty(0), pb.DTYPE_UNSPECIFIED, tensor.device)
    if prepare is not None:
        array = prepare(array)
    return ArrayInput(array, _wire_dtype(array), tensor.device)


def _wire_dtype(array: Array) -> int:
    """Return the wire type of an array; unspecified where it has none."""
    dtype = dtypes.of_numpy(array.dtype)
    if dtype is not None:
        return dtype.number
    # Only if a value is beyond int64: see _wire_integers.
    return pb.DTYPE_INT64 if array.dtype.newbyteorder("=") == np.uint64 else pb.DTYPE_UNSPECIFIED


def _wire_integers(array: Array) -> Array:
    """Return integers of a type that is not on the wire as one that is; anything else unchanged."""
    native = array.dtype.newbyteorder("=")
    if native.kind not in "iu" or dtypes.of_numpy(native) is not None:
        return array
    wider = dtypes.smallest_holding(native)
    if wider is not None:
        return array.astype(wider)
    # What is beyond int64 is in no vocabulary; the codebook's is in the text of the error (DecodeCall).
    fits = native == np.uint64 and (array.size == 0 or int(array.max()) <= np.iinfo(np.int64).max)
    return array.astype(np.int64) if fits else array


def indices_storage(dtype: int, device: object) -> np.dtype[Any]:
    """Return the numpy type of an array of indices: int64 for a torch device, else the type of the wire."""
    return payload.numpy_dtype(dtype) if device is None else np.dtype(np.int64)


def latents_storage(dtype: int, device: object) -> np.dtype[Any]:
    """Return the numpy type of latents; for types that numpy lacks, float32, or for a torch device bit patterns."""
    known = dtypes.BY_NUMBER[dtype]
    return np.dtype(np.float32) if device is None and known.coding is not None else known.storage


def store(part: Array, dtype: int, into: Array) -> None:
    """Copy the array of one reply to its place; bit patterns are widened if the place is float32."""
    if part.nbytes <= SMALL_BYTES and part.dtype == into.dtype and part.nbytes and into.flags.c_contiguous:
        into.data.cast("B")[:] = part.data.cast("B")
        return
    into[...] = dtypes.BY_NUMBER[dtype].widen(part) if into.dtype == np.float32 else part


def latents_geometry(
    shape: tuple[int, ...], layout: Layout | None, info: CodebookInfo, *, batched: bool = True
) -> Geometry:
    """Return the grid of tokens and the layout of latents of this shape.

    Args:
        shape: shape of the latents.
        layout: the caller's; None: the codebook's default.
        info: the codebook.
        batched: False: the first axis was added to the caller's array.

    Raises:
        InvalidShape: the rank or the channel count is not the codebook's.
    """
    resolved = check_latents_shape(shape, layout, info=info, batched=batched)
    if batched:
        warn_of_an_image(shape, layout, info.layout)
    return grid_shape(shape, resolved), resolved


def indices_geometry(
    shape: tuple[int, ...], layout: Layout | None, info: CodebookInfo, *, stages: int | None, batched: bool = True
) -> Geometry:
    """Return the grid of tokens of indices of this shape and the layout of the latents that they decode to.

    Args:
        shape: shape of the indices.
        layout: the caller's; None: the codebook's default.
        info: the codebook.
        stages: how many indices of each token are read; None: one, and there is no axis of stages.
        batched: as in latents_geometry.

    Raises:
        InvalidShape: the rank, or the number of indices per token, is not the codebook's.
    """
    resolved = check_indices_shape(shape, layout, info=info, num_quantizers=stages, batched=batched)
    return shape if stages is None else grid_shape(shape, resolved), resolved


@dataclass(frozen=True)
class Plan:
    """The cuts of one grid, in C order; every cut keeps all axes, so layouts and positions stay the same.

    Attributes:
        grid: the shape that is cut.
        axis: the axis that is cut into runs; the axes before it are cut into single steps, those after it not at all.
        step: the longest run on that axis; 0: the grid is one cut.
    """

    grid: tuple[int, ...]
    axis: int
    step: int

    def __len__(self) -> int:
        if not self.step:
            return 1
        return math.prod(self.grid[: self.axis]) * -(-self.grid[self.axis] // self.step)

    def __iter__(self) -> Iterator[Cut]:
        if not self.step:
            yield (slice(None),) * len(self.grid)
            return
        uncut = (slice(None),) * (len(self.grid) - self.axis - 1)
        for outer in itertools.product(*(range(length) for length in self.grid[: self.axis])):
            singles = tuple(slice(i, i + 1) for i in outer)
            length = self.grid[self.axis]
            for start in range(0, length, self.step):
                yield (*singles, slice(start, min(start + self.step, length)), *uncut)


def plan(grid: Sequence[int], max_rows: int) -> Plan:
    """Return the cuts that leave at most `max_rows` tokens (1 or more) in each, the runs of nearly equal length."""
    grid = tuple(grid)
    if math.prod(grid) <= max_rows:
        return Plan(grid, 0, 0)
    axis, inner = len(grid) - 1, 1
    while axis > 0 and inner * grid[axis] <= max_rows:
        inner *= grid[axis]
        axis -= 1
    runs = -(-grid[axis] // (max_rows // inner))
    return Plan(grid, axis, -(-grid[axis] // runs))


def latents_cut(cut: Cut, layout: Layout) -> Cut:
    """Return the cut of the latents that belongs to a cut of the grid: all channels of it."""
    axis = channel_axis(layout)
    return (*cut, slice(None)) if axis < 0 else (*cut[:axis], slice(None), *cut[axis:])


def indices_cut(cut: Cut, stages: int | None, layout: Layout) -> Cut:
    """Return the cut of the indices that belongs to a cut of the grid: all stages of it."""
    return cut if stages is None else latents_cut(cut, layout)


def rows_per_message(max_message_bytes: int, name_bytes: int, *row_bytes: int) -> int:
    """Return how many tokens fit a message, perhaps 0.

    Args:
        max_message_bytes: largest size of a request or a reply.
        name_bytes: size of the codebook's name.
        row_bytes: sizes of one token, in the request and in the reply.
    """
    payload_bytes = max_message_bytes - ENVELOPE_BYTES - name_bytes
    return max(0, payload_bytes // max(row_bytes))


def cut_text(cut: Cut) -> str:
    """Return a cut as Python writes it: [0:1, 16:32, :]."""
    runs = (":" if run == slice(None) else f"{run.start}:{run.stop}" for run in cut)
    return f"[{', '.join(runs)}]"


def of_whole(error: VqserveError, *, array: Cut, grid: Cut) -> VqserveError:
    """Return an error about a part of an array as an error about the whole array; unchanged if it has no position.

    Args:
        error: error of the server, which received only the part.
        array: the part, as a cut of the whole array.
        grid: the part, as a cut of the whole array's tokens.
    """
    cut = grid if error.array == "tokens" else array
    return error.shifted([run.start or 0 for run in cut])
