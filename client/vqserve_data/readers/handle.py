"""An open source, which many threads read at places of their own, and the arrays that lie in it."""

from __future__ import annotations

import io
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from vqserve.dtypes import BFLOAT16
from vqserve.npy import StoredArray, read_header
from vqserve_data.errors import FileError
from vqserve_data.items import Array, BadItem, Cut, Item, SourceArray
from vqserve_data.keys import one_line
from vqserve_data.readers.protocol import SourceFile

# Arrays up to this size are read into memory at once; larger ones part by part.
WHOLE_BYTES = 32 << 20
# No more is made of a byte of compressed data: deflate cannot (https://zlib.net/zlib_tech.html), and only numbers that
# are all the same can be packed better.
MOST_OF_A_BYTE = 1032
# Chunks of HDF5 and Zarr, which are unpacked as a whole.
MAX_CHUNK_BYTES = 1 << 30
# What is read at once rather than as a header and elements.
_SMALL_BYTES = 1 << 16
# Most headers are shorter.
_HEADER_BYTES = 4096
LONGEST_HEADER_BYTES = 1 << 17


class Handle(ABC):
    """Bytes that many threads read at places of their own.

    Attributes:
        name: of the source that they belong to.
        size: how many they are.
    """

    def __init__(self, name: str, size: int) -> None:
        """Store what they are called, and how many they are."""
        self.name = name
        self.size = size

    @abstractmethod
    def _read_some(self, buffer: memoryview, offset: int) -> int:
        """Fill the beginning of a buffer with the bytes from an offset on; return how many, 0 at the end."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from an offset on.

        Raises:
            EOFError: there are fewer.
            Exception: the source cannot be read; remote ones raise errors of their own.
        """
        while buffer:
            count = self._read_some(buffer, offset)
            if not count:
                raise EOFError("it ends early; it may have been truncated while it was read")
            buffer, offset = buffer[count:], offset + count

    def read(self, offset: int, count: int) -> bytes:
        """Return up to this many bytes, fewer only at the end. Raises as `read_into`."""
        data = bytearray(max(0, min(count, self.size - offset)))
        self.read_into(memoryview(data), offset)
        return bytes(data)

    def stream(self) -> IO[bytes]:
        """Return a file with a position of its own. No read allocates more than what is left of the source."""
        return _Stream(self)  # type: ignore[return-value]


class _LocalHandle(Handle):
    def __init__(self, name: str, opened: IO[bytes]) -> None:
        super().__init__(name, os.fstat(opened.fileno()).st_size)
        self._fd = os.dup(opened.fileno())
        weakref.finalize(self, os.close, self._fd)

    def _read_some(self, buffer: memoryview, offset: int) -> int:
        return os.preadv(self._fd, [buffer], offset)


class _RemoteHandle(Handle):
    def __init__(self, name: str, opened: IO[bytes]) -> None:
        super().__init__(name, opened.seek(0, os.SEEK_END))
        self._file = opened
        self._lock = threading.Lock()
        weakref.finalize(self, opened.close)

    def _read_some(self, buffer: memoryview, offset: int) -> int:
        with self._lock:
            self._file.seek(offset)
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class MemoryHandle(Handle):
    """Bytes in memory."""

    def __init__(self, name: str, data: bytes) -> None:
        """Store them."""
        super().__init__(name, len(data))
        self._data = memoryview(data)

    def _read_some(self, buffer: memoryview, offset: int) -> int:
        part = self._data[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        return len(part)


def open_source(file: SourceFile) -> Handle:
    """Open a source; it is closed when nothing refers to it any more.

    Raises:
        FileError: it cannot be opened.
    """
    opened = file.open()
    if file.path is None:
        return _RemoteHandle(file.name, opened)
    with opened:
        return _LocalHandle(file.name, opened)


class _Stream(io.RawIOBase):
    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._handle.size}[whence]
        if base + offset < 0:
            raise ValueError("a position in front of the beginning of the file")
        self._position = base + offset
        return self._position

    def read(self, count: int | None = -1) -> bytes:
        left = max(0, self._handle.size - self._position)
        data = self._handle.read(self._position, left if count is None or count < 0 else min(count, left))
        self._position += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._handle.size - self._position))
        self._handle.read_into(view[:count], self._position)
        self._position += count
        return count


class _HandleArray(StoredArray):
    """An array whose elements lie somewhere in an open source."""

    def __init__(
        self, handle: Handle, start: int, shape: tuple[int, ...], dtype: np.dtype[Any], *, is_fortran: bool
    ) -> None:
        super().__init__(shape, dtype, is_fortran=is_fortran)
        self._handle = handle
        self._start = start

    def _read_into(self, buffer: memoryview, offset: int) -> None:
        try:
            self._handle.read_into(buffer, self._start + offset)
        except Exception as error:
            raise FileError(f"cannot read {self._handle.name}: {one_line(error)}") from error


class _Widened:
    """An array of bit patterns of bfloat16, read as float32 with the same values."""

    def __init__(self, bits: SourceArray) -> None:
        self._bits = bits
        self.shape = bits.shape
        self.dtype = np.dtype(np.float32)

    def __getitem__(self, cut: Cut) -> Array:
        return BFLOAT16.widen(self._bits[cut])


def check_numbers(dtype: np.dtype[Any]) -> None:
    """Check that elements of this type can be latents or indices.

    Raises:
        ValueError: they are no real numbers.
    """
    if dtype.kind not in "fiu":
        raise ValueError(f"it holds elements of type {dtype}, not numbers")


def stored_array(
    handle: Handle,
    start: int,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    *,
    stop: int | None = None,
    is_fortran: bool = False,
    is_bfloat16: bool = False,
) -> SourceArray:
    """Return the array whose elements begin at an offset of a source: in memory, or if it is large read when indexed.

    Args:
        handle: the source.
        start: offset in bytes.
        shape: lengths of the axes.
        dtype: type of the elements as they are stored.
        stop: where at the latest they end; None: at the end of the source.
        is_fortran: whether the first axis varies fastest.
        is_bfloat16: whether the elements are bit patterns of bfloat16.

    Raises:
        ValueError: the elements are no numbers, or the source is too short.
    """
    check_numbers(dtype)
    array = _HandleArray(handle, start, shape, dtype, is_fortran=is_fortran)
    held = max(0, (handle.size if stop is None else min(stop, handle.size)) - start)
    if array.nbytes > held:
        raise ValueError(f"an array of shape {shape} needs {array.nbytes} bytes and it has {held}: it is incomplete")
    if array.nbytes > WHOLE_BYTES:
        return _Widened(array) if is_bfloat16 else array
    whole: Array = np.empty(shape[::-1] if is_fortran else shape, dtype)
    if whole.nbytes:
        handle.read_into(whole.reshape(-1).view(np.uint8).data, start)
    whole = whole.T if is_fortran else whole
    return BFLOAT16.widen(whole) if is_bfloat16 else whole


def npy_header(handle: Handle, start: int, stop: int) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Read the header of an array in the format of .npy files.

    Returns:
        Its shape, whether the first axis varies fastest, its element type, and where its elements begin.

    Raises:
        ValueError: there is no such header, or the elements are no numbers.
    """
    head = io.BytesIO(handle.read(start, min(_HEADER_BYTES, stop - start)))
    try:
        shape, is_fortran, dtype = read_header(head)
    except ValueError:
        if stop - start <= _HEADER_BYTES:
            raise
        head = io.BytesIO(handle.read(start, min(LONGEST_HEADER_BYTES, stop - start)))
        shape, is_fortran, dtype = read_header(head)
    check_numbers(dtype)
    return shape, is_fortran, dtype, start + head.tell()


def stored_npy(handle: Handle, start: int, stop: int) -> SourceArray:
    """Return the array in the format of .npy files between two offsets of a source. Raises as `stored_array`."""
    if stop - start <= min(_SMALL_BYTES, WHOLE_BYTES) and not isinstance(handle, MemoryHandle):
        # Header and elements are read at once.
        data = handle.read(start, stop - start)
        handle, start, stop = MemoryHandle(handle.name, data), 0, len(data)
    shape, is_fortran, dtype, begin = npy_header(handle, start, stop)
    return stored_array(handle, begin, shape, dtype, stop=stop, is_fortran=is_fortran)


def item_or_bad(key: str, file: SourceFile, array: Callable[[], SourceArray]) -> Item | BadItem:
    """Return an item, or what is wrong with it: a stranger's file makes libraries raise errors of any type."""
    try:
        return Item(key, array(), file.name)
    except Exception as error:
        return BadItem(key, file.name, reason(file, error))


def reason(file: SourceFile, error: Exception) -> str:
    """Return what an error says of a source, without its name."""
    text = one_line(error)
    for before in (f"cannot read {file.name}: ", f"{file.name}: ", f"{file.name} ", f"{Path(file.name).name}: "):
        text = text.removeprefix(before)
    return text
