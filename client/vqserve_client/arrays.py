"""The caller's arrays: numpy or torch in, the same kind out; what their shape means, and how they are cut.

torch is never imported here: a caller who passes a tensor has imported it.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from vqserve import bfloat16, payload
from vqserve.codebook_info import CodebookInfo
from vqserve.layout import (
    Layout,
    channel_axis,
    grid_shape,
    resolve_layout,
    warn_of_an_image,
    wrong_channels,
    wrong_stages,
)
from vqserve.payload import ENVELOPE_BYTES
from vqserve.refused import not_an_array, not_indices, not_latents
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_client.errors import InvalidArgument

Array = npt.NDArray[Any]
T = TypeVar("T")

# Integers that do not travel, and the ones that hold them.
_WIDENED = {np.dtype(np.int8): np.int32, np.dtype(np.int16): np.int32}


@dataclass(frozen=True)
class Given:
    """What the caller gave, ready to be cut and sent.

    Attributes:
        array: the values, of any strides and byte order; bfloat16 as uint16 bit patterns.
        dtype: the wire type.
        device: the torch tensor's device; None for numpy.
    """

    array: Array
    dtype: int
    device: Any = None

    @property
    def is_torch(self) -> bool:
        """Return whether the caller gave a tensor."""
        return self.device is not None

    def joins(self, other: Given) -> bool:
        """Return whether both can be one array, along the first axis."""
        mine, theirs = self.array, other.array
        return (
            (self.dtype, mine.dtype, self.is_torch) == (other.dtype, theirs.dtype, other.is_torch)
            and mine.ndim == theirs.ndim > 0
            and mine.shape[1:] == theirs.shape[1:]
        )


def given_latents(latents: object) -> Given:
    """Return latents as they travel.

    Raises:
        TypeError: for what is neither a numpy array nor a torch tensor.
        InvalidArgument: for elements that are not float16, bfloat16, float32 or float64.
    """
    return _given(latents, "latents", payload.LATENT_DTYPES, not_latents)


def given_indices(indices: object) -> Given:
    """Return indices as they travel.

    Raises:
        TypeError: for what is neither a numpy array nor a torch tensor.
        InvalidArgument: for elements that are no integers, or that int64 does not hold.
    """
    return _given(indices, "indices", payload.INDEX_DTYPES, not_indices, _travelling_integers)


def several(items: T, verb: str) -> T:
    """Return what `encode_many` or `decode_many` was given.

    Raises:
        TypeError: it is one array, whose first axis would be taken apart.
    """
    torch = sys.modules.get("torch")
    if isinstance(items, np.ndarray) or (torch is not None and isinstance(items, torch.Tensor)):
        raise TypeError(f"{verb}_many takes an iterable of arrays, not one: {verb}(x), or {verb}_many([x])")
    return items


def joined(givens: Sequence[Given]) -> Given:
    """Return arrays that join as one."""
    if len(givens) == 1:
        return givens[0]
    return replace(givens[0], array=np.concatenate([given.array for given in givens]))


def _given(
    value: object,
    what: str,
    allowed: frozenset[int],
    refusal: Callable[[object], str],
    prepare: Callable[[Array], Array] = lambda array: array,
) -> Given:
    torch = sys.modules.get("torch")
    dtype: object
    if torch is not None and isinstance(value, torch.Tensor):
        given, dtype = _given_tensor(torch, value, what, prepare), value.dtype
    elif isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray):
        array = prepare(np.asarray(value))
        given, dtype = Given(array, _wire_dtype(array)), array.dtype
    else:
        raise TypeError(not_an_array(what, value))
    if given.dtype not in allowed:
        raise InvalidArgument(refusal(dtype))
    return given


def _given_tensor(torch: Any, tensor: Any, what: str, prepare: Callable[[Array], Array]) -> Given:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise TypeError(f"{what} must be a dense torch tensor with values, not {tensor.layout} on {tensor.device}")
    # A lazily negated tensor has no numpy form; its values have.
    plain = tensor.detach().resolve_conj().resolve_neg().cpu()
    if plain.dtype == torch.bfloat16:
        return Given(plain.view(torch.int16).numpy().view(np.uint16), pb.DTYPE_BFLOAT16, tensor.device)
    try:
        array = prepare(plain.numpy())
    except TypeError:
        # A type that numpy does not have, as float8.
        return Given(np.empty(0), pb.DTYPE_UNSPECIFIED, tensor.device)
    return Given(array, _wire_dtype(array), tensor.device)


def _wire_dtype(array: Array) -> int:
    """Return the wire type of an array; unspecified where it has none."""
    try:
        return payload.dtype_of(array)
    except payload.PayloadError:
        return pb.DTYPE_UNSPECIFIED


def _travelling_integers(array: Array) -> Array:
    """Return integers of a width that does not travel in one that does; anything else as it is."""
    native = array.dtype.newbyteorder("=")
    if native in _WIDENED:
        return array.astype(_WIDENED[native])
    if native == np.uint64:
        if array.size and array.max() > np.iinfo(np.int64).max:
            raise InvalidArgument(f"indices hold {array.max()}, which no vocabulary has")
        return array.astype(np.int64)
    return array


def index_store(shape: tuple[int, ...], dtype: int, *, is_torch: bool) -> Array:
    """Return an empty array for indices: int64 for torch, else the type they travel in."""
    return np.empty(shape, np.int64 if is_torch else np.dtype(payload.dtype_name(dtype)))


def latent_store(shape: tuple[int, ...], dtype: int, *, is_torch: bool) -> Array:
    """Return an empty array for latents; for bfloat16, bit patterns for torch and float32 for numpy."""
    if dtype == pb.DTYPE_BFLOAT16:
        return np.empty(shape, np.uint16 if is_torch else np.float32)
    return np.empty(shape, np.dtype(payload.dtype_name(dtype)))


def store(part: Array, dtype: int, into: Array) -> None:
    """Copy the array of one reply to its place, widening bfloat16 where the place is float32."""
    if dtype == pb.DTYPE_BFLOAT16 and into.dtype == np.float32:
        part = bfloat16.widen(part)
    into[...] = part


def handed_back(array: Array, dtype: int, given: Given) -> Any:
    """Return an assembled array as the caller's kind, on the caller's device."""
    if not given.is_torch:
        return array
    torch = sys.modules["torch"]
    if dtype == pb.DTYPE_BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(given.device)
    return torch.from_numpy(array).to(given.device)


Cut = tuple[slice, ...]


@dataclass(frozen=True)
class Plan:
    """The cuts of one grid, in C order; every cut keeps all axes, so layouts and positions stay what they are.

    Attributes:
        grid: the shape that is cut.
        axis: the axis that is cut into runs; the axes before it are cut into single steps, those after it not at all.
        step: the longest run on that axis.
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
    """Return the cut of the indices that belongs to a cut of the grid: all of each token."""
    return cut if stages is None else latents_cut(cut, layout)


def rows_per_message(max_message_bytes: int, name_bytes: int, *row_bytes: int) -> int:
    """Return how many tokens fit a message when one takes so many bytes, in the request and in the reply; maybe 0."""
    payload_bytes = max_message_bytes - ENVELOPE_BYTES - name_bytes
    return max(0, payload_bytes // max(row_bytes))


def cut_text(cut: Cut) -> str:
    """Return a cut as Python writes it: [0:1, 16:32, :]."""
    runs = (":" if run == slice(None) else f"{run.start}:{run.stop}" for run in cut)
    return f"[{', '.join(runs)}]"


Geometry = tuple[tuple[int, ...], Layout]


def latents_geometry(shape: tuple[int, ...], layout: Layout | None, info: CodebookInfo) -> Geometry:
    """Return the grid of tokens and the layout of latents of this shape.

    Args:
        shape: of the latents.
        layout: what the caller asked for; None: the codebook's default.
        info: the codebook.

    Raises:
        ValueError: the rank or the channel count is not the codebook's.
    """
    resolved = resolve_layout(len(shape), layout, info.layout)
    if shape[channel_axis(resolved)] != info.input_dim:
        raise ValueError(wrong_channels(shape, resolved, info.input_dim))
    warn_of_an_image(shape, layout, info.layout)
    return grid_shape(shape, resolved), resolved


def indices_geometry(
    shape: tuple[int, ...], layout: Layout | None, info: CodebookInfo, *, stages: int | None
) -> Geometry:
    """Return the grid of tokens of indices of this shape and the layout of the latents that they decode to.

    Args:
        shape: of the indices.
        layout: what the caller asked for; None: the codebook's default.
        info: the codebook.
        stages: how many indices of each token are read; None: its one, without an axis of them.

    Raises:
        ValueError: the rank, or the number of indices for a token, is not the codebook's.
    """
    fewest, most = (1, 4) if stages is None else (2, 5)
    if not fewest <= len(shape) <= most:
        raise ValueError(f"indices must have {fewest} to {most} axes, not {len(shape)}")
    if stages is None:
        return shape, resolve_layout(len(shape) + 1, layout, info.layout)
    resolved = resolve_layout(len(shape), layout, info.layout)
    if not stages <= shape[channel_axis(resolved)] <= info.num_quantizers:
        raise ValueError(wrong_stages(shape, resolved, wanted=stages, available=info.num_quantizers))
    return grid_shape(shape, resolved), resolved
