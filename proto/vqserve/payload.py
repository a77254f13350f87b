"""Arrays to payloads (raw little-endian bytes in C order) and back: the one codec of both sides."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vqserve import dtypes
from vqserve.v1 import tokenizer_pb2 as pb

# What a message holds beside its payload and the codebook's name, at most: digest, shape, statistics, tags.
ENVELOPE_BYTES = 512
# Bytes that numpy can address, and axes that an array can have (numpy 1's).
_LARGEST_ARRAY = (1 << 63) - 1
_MOST_AXES = 32

_NUMPY = {number: dtype.storage for number, dtype in dtypes.BY_NUMBER.items()}
LATENT_DTYPES = frozenset(dtype.number for dtype in dtypes.LATENTS)
INDEX_DTYPES = frozenset(dtype.number for dtype in dtypes.INDICES)


class PayloadError(ValueError):
    """A payload does not hold the array that its message claims."""


def dtype_name(dtype: int) -> str:
    """Return "float32" for DTYPE_FLOAT32 and so on; of an unknown number, that number."""
    try:
        return pb.DType.Name(dtype).removeprefix("DTYPE_").lower()
    except ValueError:
        return f"unknown dtype {dtype}"


def dtype_of_name(name: str) -> int:
    """Return DTYPE_FLOAT32 for "float32" and so on.

    Raises:
        ValueError: for a name that the wire does not have.
    """
    dtype = dtypes.BY_NAME.get(name)
    if dtype is None:
        raise ValueError(f"no dtype {name!r} on the wire: it has {', '.join(dtypes.BY_NAME)}")
    return dtype.number


def itemsize(dtype: int) -> int:
    """Return the bytes of one element."""
    return _NUMPY[dtype].itemsize


def index_dtype(vocab_size: int) -> int:
    """Return the smallest unsigned type that holds every index in [0, vocab_size)."""
    return dtype_of_name(dtypes.smallest_unsigned(vocab_size).name)


def holds_vocabulary(dtype: int, vocab_size: int) -> bool:
    """Return whether an integer type holds every index in [0, vocab_size)."""
    integer = _NUMPY[dtype]
    bits = 8 * integer.itemsize - (integer.kind == "i")
    return vocab_size <= 1 << bits


def dtype_of(array: npt.NDArray[np.generic]) -> int:
    """Return the wire type of a numpy array.

    Raises:
        PayloadError: for a type that does not travel.
    """
    dtype = dtypes.of_numpy(array.dtype)
    if dtype is None:
        raise PayloadError(f"arrays of {array.dtype} do not travel: use one of {', '.join(dtypes.BY_NAME)}")
    return dtype.number


def view(array: npt.NDArray[np.generic], dtype: int) -> memoryview:
    """Return an array's payload: its own memory if it lies there as on the wire, else that of a copy.

    Args:
        array: for bfloat16 float32 (rounded here) or uint16 bit patterns.
        dtype: the wire type.
    """
    element = dtypes.BY_NUMBER[dtype]
    if element.coding is not None:
        array = element.narrow(array)
    return np.ascontiguousarray(array, dtype=element.storage).reshape(-1).view(np.uint8).data


def to_bytes(array: npt.NDArray[np.generic], dtype: int) -> bytes:
    """Return a copy of an array's payload; see `view`."""
    return bytes(view(array, dtype))


def nbytes(dtype: int, shape: Sequence[int]) -> int:
    """Return the bytes of an array's payload; the numbers may be any that a message can claim."""
    return math.prod(shape) * itemsize(dtype)


def check(size: int, dtype: int, shape: Sequence[int]) -> None:
    """Refuse a payload of `size` bytes that is not that of such an array.

    Raises:
        PayloadError: the type is not on the wire, or the sizes differ.
    """
    if dtype not in _NUMPY:
        raise PayloadError(f"dtype must be set: got {dtype_name(dtype)}")
    # Python's integers cannot overflow, whatever the sender claims.
    element_bytes = _NUMPY[dtype].itemsize
    expected = math.prod(shape) * element_bytes
    if expected != size:
        raise PayloadError(f"shape {tuple(shape)} of {dtype_name(dtype)} is {expected} bytes, the payload has {size}")
    # An axis of zero lets the others be as large as they like.
    if len(shape) > _MOST_AXES or math.prod(max(length, 1) for length in shape) * element_bytes > _LARGEST_ARRAY:
        raise PayloadError(f"shape {tuple(shape)} is too large for an array")


def from_bytes(data: bytes | memoryview, dtype: int, shape: Sequence[int]) -> npt.NDArray[np.generic]:
    """Return the array in a payload, as a read-only view; bfloat16 comes as uint16 bit patterns.

    Raises:
        PayloadError: when the type is not on the wire or the bytes are not those of such an array.
    """
    check(len(data), dtype, shape)
    return np.frombuffer(data, dtype=_NUMPY[dtype]).reshape(tuple(shape))


def numpy_dtype(dtype: int) -> np.dtype[np.generic]:
    """Return the numpy type of a wire type; uint16 for bfloat16."""
    return _NUMPY[dtype]
