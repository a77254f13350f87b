"""Arrays on the wire, for client and server: payloads (raw little-endian bytes in C order), and numbers of layouts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from vqserve import dtypes
from vqserve.layout import Layout
from vqserve.v1 import tokenizer_pb2 as pb

# A message has at most this many bytes beside its payload and the codebook's name: digest, shape, statistics, tags.
ENVELOPE_BYTES = 512
# The most bytes that numpy can address, and the most axes of an array in numpy 1.
_LARGEST_ARRAY = (1 << 63) - 1
_MOST_AXES = 32

_NUMPY = {number: dtype.storage for number, dtype in dtypes.BY_NUMBER.items()}
LATENT_DTYPES = frozenset(dtype.number for dtype in dtypes.LATENTS)
INDEX_DTYPES = frozenset(dtype.number for dtype in dtypes.INDICES)
# None: the codebook's default.
LAYOUT_OF_NUMBER: Mapping[int, Layout | None] = MappingProxyType(
    {
        pb.LAYOUT_UNSPECIFIED: None,
        pb.LAYOUT_CHANNELS_FIRST: Layout.CHANNELS_FIRST,
        pb.LAYOUT_CHANNELS_LAST: Layout.CHANNELS_LAST,
    }
)
NUMBER_OF_LAYOUT = MappingProxyType({layout: number for number, layout in LAYOUT_OF_NUMBER.items()})


class PayloadError(ValueError):
    """A payload does not hold the array that its message claims."""


def dtype_name(dtype: int) -> str:
    """Return "float32" for DTYPE_FLOAT32 and so on; for an unknown number, a text with that number."""
    try:
        return pb.DType.Name(dtype).removeprefix("DTYPE_").lower()
    except ValueError:
        return f"unknown dtype {dtype}"


def dtype_of_name(name: str) -> int:
    """Return DTYPE_FLOAT32 for "float32" and so on.

    Raises:
        ValueError: the wire has no type of that name.
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
        PayloadError: the wire does not have the type.
    """
    dtype = dtypes.of_numpy(array.dtype)
    if dtype is None:
        raise PayloadError(f"arrays of {array.dtype} cannot be sent: use one of {', '.join(dtypes.BY_NAME)}")
    return dtype.number


def view(array: npt.NDArray[np.generic], dtype: int) -> memoryview:
    """Return an array's payload: a view of the array if its memory is as on the wire, else of a copy.

    Args:
        array: the array; for bfloat16, float32 values (rounded here) or uint16 bit patterns.
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
    """Return the size of an array's payload in bytes; the shape may hold any numbers that a message can."""
    return math.prod(shape) * itemsize(dtype)


def check(size: int, dtype: int, shape: Sequence[int]) -> None:
    """Check that an array of this type and shape has a payload of `size` bytes.

    Raises:
        PayloadError: the wire does not have the type, or the sizes differ.
    """
    if dtype not in _NUMPY:
        raise PayloadError(f"dtype must be set: got {dtype_name(dtype)}")
    # Python integers do not overflow: the shape may hold any numbers.
    element_bytes = _NUMPY[dtype].itemsize
    expected = math.prod(shape) * element_bytes
    if expected != size:
        raise PayloadError(f"shape {tuple(shape)} of {dtype_name(dtype)} is {expected} bytes, the payload has {size}")
    # With an axis of length zero the other axes could have any length.
    largest = size or math.prod(length or 1 for length in shape) * element_bytes
    if len(shape) > _MOST_AXES or largest > _LARGEST_ARRAY:
        raise PayloadError(f"shape {tuple(shape)} is too large for an array")


def from_bytes(data: bytes | memoryview, dtype: int, shape: Sequence[int]) -> npt.NDArray[np.generic]:
    """Return the array in a payload, as a read-only view; bfloat16 comes as uint16 bit patterns.

    Raises:
        PayloadError: the wire does not have the type, or the number of bytes is wrong.
    """
    check(len(data), dtype, shape)
    return np.frombuffer(data, dtype=_NUMPY[dtype]).reshape(tuple(shape))


def numpy_dtype(dtype: int) -> np.dtype[np.generic]:
    """Return the numpy type of a wire type; uint16 for bfloat16."""
    return _NUMPY[dtype]
