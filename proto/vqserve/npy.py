"""Arrays of `.npy` files, read part by part.

They are not memory-mapped: where somebody truncates a mapped file, SIGBUS ends its readers without a word.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# What a read costs, roughly: seconds of a call, and of a byte from the page cache.
_CALL_S = 3e-6
_BYTE_S = 2e-10
# Bytes that are read at once to keep a part of them.
_SCRATCH_BYTES = 1 << 22
# numpy parses headers of up to 10,000 characters.
_MAX_HEADER_BYTES = 1 << 16


class TruncatedFile(OSError):
    """A file became shorter while it was read."""


class StoredArray(ABC):
    """An array whose elements lie together somewhere; a part is read when it is indexed.

    Attributes:
        shape: shape of the array.
        dtype: its element type, in the byte order in which it is stored.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], *, is_fortran: bool = False) -> None:
        """Store what it looks like.

        Args:
            shape: lengths of the axes.
            dtype: type of the elements.
            is_fortran: whether the first axis varies fastest.
        """
        self.shape = shape
        self.dtype = dtype
        self._is_fortran = is_fortran

    @abstractmethod
    def _read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from an offset on, counted from the first element."""

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes of the elements."""
        return self.size * self.dtype.itemsize

    @property
    def is_fortran(self) -> bool:
        """Whether the first axis varies fastest in the file."""
        return self._is_fortran

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, cut: slice | tuple[slice, ...]) -> Array:
        """Read a part.

        Args:
            cut: slices without steps, of the first axes or of all.

        Returns:
            A copy, also of an array of no axes.

        Raises:
            TruncatedFile: a file became shorter since it was opened.
            OSError: it cannot be read.
        """
        slices = cut if isinstance(cut, tuple) else (cut,)
        slices += (slice(None),) * (self.ndim - len(slices))
        bounds = [each.indices(length)[:2] for each, length in zip(slices, self.shape, strict=True)]
        bounds = [(start, max(start, stop)) for start, stop in bounds]
        if self._is_fortran:
            return self._read(bounds[::-1], self.shape[::-1]).T
        return self._read(bounds, self.shape)

    def items(self, positions: npt.NDArray[np.int64]) -> Array:
        """Read items of the first axis.

        Args:
            positions: (n,) in [0, len).

        Returns:
            (n, ...), a copy.

        Raises:
            TruncatedFile, OSError: as for a part.
        """
        out = np.empty((len(positions), *self.shape[1:]), self.dtype)
        if self._is_fortran:
            for place, position in enumerate(positions.tolist()):
                out[place] = self[position : position + 1][0]
            return out
        if not out.nbytes:
            return out
        item_bytes = out[0].nbytes
        raw = _bytes_of(out)
        # Neighbours are read at once.
        ends = np.flatnonzero(np.diff(positions) != 1) + 1
        for first, last in itertools.pairwise([0, *ends.tolist(), len(positions)]):
            self._read_into(raw[first * item_bytes : last * item_bytes], int(positions[first]) * item_bytes)
        return out

    def _read(self, bounds: list[tuple[int, int]], shape: tuple[int, ...]) -> Array:
        """Read a part of an array in C order."""
        lengths = tuple(stop - start for start, stop in bounds)
        out = np.empty(lengths, self.dtype)
        if not out.nbytes:
            return out
        if not shape:
            self._read_into(_bytes_of(out), 0)
            return out
        # Bytes of an item of each axis.
        strides = [math.prod(shape[axis + 1 :]) * self.dtype.itemsize for axis in range(len(shape))]
        axis = _axis_of_reads(lengths, shape, strides)
        is_whole = lengths[axis + 1 :] == shape[axis + 1 :]
        inner = tuple(slice(start, stop) for start, stop in bounds[axis + 1 :])
        first, stop = bounds[axis]
        for outer in itertools.product(*(range(length) for length in lengths[:axis])):
            offset = sum((start + at) * stride for (start, _), at, stride in zip(bounds, outer, strides, strict=False))
            if is_whole:
                self._read_into(_bytes_of(out[outer]), offset + first * strides[axis])
                continue
            for start, end in _steps(first, stop, max(1, _SCRATCH_BYTES // strides[axis])):
                scratch = np.empty((end - start, *shape[axis + 1 :]), self.dtype)
                self._read_into(_bytes_of(scratch), offset + start * strides[axis])
                out[outer][start - first : end - first] = scratch[(slice(None), *inner)]
        return out


class NpyFile(StoredArray):
    """The array in a .npy file. Safe for use by many threads.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        """Open a file and check its header against its length; pickled objects are refused.

        Raises:
            OSError: it cannot be read.
            ValueError: it is not a .npy file of numbers, or it is incomplete.
        """
        self.path = path
        with path.open("rb") as file:
            shape, is_fortran, dtype = read_header(file)
            self._start = file.tell()
            size = os.fstat(file.fileno()).st_size - self._start
            self._fd = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._fd)
        super().__init__(shape, dtype, is_fortran=is_fortran)
        if self.nbytes > size:
            raise ValueError(f"an array of shape {shape} needs {self.nbytes} bytes and it has {size}: it is incomplete")

    def _read_into(self, buffer: memoryview, offset: int) -> None:
        at = self._start + offset
        while buffer:
            count = os.preadv(self._fd, [buffer], at)
            if count == 0:
                raise TruncatedFile(f"{self.path} was truncated while it was read")
            buffer, at = buffer[count:], at + count


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the header of an array in the format of .npy files, up to where its elements begin.

    Returns:
        Its shape, whether the first axis varies fastest, and its element type, which is no Python object.

    Raises:
        OSError: the file cannot be read.
        ValueError: there is no such header, or it is of an array of Python objects.
    """
    prefix = file.read(len(np.lib.format.MAGIC_PREFIX) + 2)
    if not prefix.startswith(np.lib.format.MAGIC_PREFIX):
        raise ValueError("it does not begin as a .npy file does" if prefix else "it is empty")
    version = tuple(prefix[-2:])
    if version not in _PARSERS:
        # 3.0 is for names in UTF-8 of fields of structures.
        raise ValueError(f"version {version[0]}.{version[1]} of the .npy format is not read: is the file damaged?")
    length_bytes = file.read(2 if version == (1, 0) else 4)
    length = int.from_bytes(length_bytes, "little")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"its header claims {length} bytes, more than any array of numbers has")
    header = file.read(length)
    if len(header) < length:
        raise ValueError("it is incomplete: it ends in its header")
    return _parsed(version, length_bytes + header)


_PARSERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@functools.lru_cache(maxsize=256)
def _parsed(version: tuple[int, int], header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Parse a header; many files have the same one, and parsing takes longer than reading a small file."""
    try:
        shape, is_fortran, dtype = _PARSERS[version](io.BytesIO(header))
    except Exception as error:
        # numpy evaluates the text as a literal, which can fail in many ways.
        raise ValueError(f"its header cannot be parsed: {' '.join(str(error).split())[:200]}") from None
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not loaded")
    if min(shape, default=0) < 0:
        raise ValueError(f"its header claims shape {shape}: it is incomplete, or no .npy file")
    return shape, is_fortran, dtype


def _axis_of_reads(lengths: tuple[int, ...], shape: tuple[int, ...], strides: list[int]) -> int:
    """Return the axis along which each read goes, so that all reads of a part together take the least time.

    A read takes whole items of the axis, also the elements of them that are not wanted. An item of an inner axis has
    fewer of these, but more reads are needed.

    Args:
        lengths: lengths of the part; not empty.
        shape: lengths of the array.
        strides: bytes of an item of each axis.
    """

    def seconds(axis: int) -> float:
        return math.prod(lengths[:axis]) * (_CALL_S + lengths[axis] * strides[axis] * _BYTE_S)

    # Items that are read in part go through a buffer, which must not be large. One element always fits.
    allowed = [
        axis
        for axis, stride in enumerate(strides)
        if stride <= _SCRATCH_BYTES or lengths[axis + 1 :] == shape[axis + 1 :]
    ]
    return min(allowed, key=seconds)


def _steps(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def _bytes_of(array: Array) -> memoryview:
    """Return the memory of an array in C order."""
    return array.reshape(-1).view(np.uint8).data
