"""numpy and torch arrays in, the same kind out; torch is never imported, only met when the caller has."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from vqserve import bfloat16, payload
from vqserve.errors import InvalidDtype
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve.validation import (
    LARGEST_VOCABULARY,
    not_an_array,
    not_an_index,
    not_dense,
    not_indices,
    not_latents,
    not_several,
)

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
        NotAnArray: for what is neither a numpy array nor a torch tensor.
        InvalidDtype: for elements that are not float16, bfloat16, float32 or float64.
    """
    return _given(latents, "latents", payload.LATENT_DTYPES, not_latents)


def given_indices(indices: object) -> Given:
    """Return indices as they travel.

    Raises:
        NotAnArray: for what is neither a numpy array nor a torch tensor.
        InvalidDtype: for elements that are no integers.
        IndexOutOfRange: for one that int64 does not hold.
    """
    return _given(indices, "indices", payload.INDEX_DTYPES, not_indices, _travelling_integers)


def several(items: T, verb: str) -> T:
    """Return what `encode_many` or `decode_many` was given.

    Raises:
        NotAnArray: it is one array, whose first axis would be taken apart.
    """
    torch = sys.modules.get("torch")
    if isinstance(items, np.ndarray) or (torch is not None and isinstance(items, torch.Tensor)):
        raise not_several(verb)
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
    refusal: Callable[[object], InvalidDtype],
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
        raise not_an_array(what, value)
    if given.dtype not in allowed:
        raise refusal(dtype)
    return given


def _given_tensor(torch: Any, tensor: Any, what: str, prepare: Callable[[Array], Array]) -> Given:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise not_dense(what, dtype=tensor.dtype, layout=tensor.layout, device=tensor.device)
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
        beyond = array > np.iinfo(np.int64).max
        if beyond.any():
            position = tuple(int(i) for i in np.unravel_index(int(beyond.argmax()), array.shape))
            raise not_an_index(position, int(array[position]), LARGEST_VOCABULARY)
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
