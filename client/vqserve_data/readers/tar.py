"""Tars of samples, as WebDataset has them: members of one name and several extensions, next to each other.

The rule of keys is WebDataset's (https://github.com/webdataset/webdataset, tariterators.py): the key is the path up to
the first dot of the last part, the extension is what follows.
"""

from __future__ import annotations

import gzip
import io
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from vqserve_data.errors import FileError
from vqserve_data.items import BadItem, Entry, Item, RawItem, Record
from vqserve_data.keys import problem_of, quoted
from vqserve_data.readers.handle import (
    LONGEST_HEADER_BYTES,
    Handle,
    MemoryHandle,
    npy_header,
    open_source,
    reason,
    stored_npy,
)
from vqserve_data.readers.protocol import Selection, SourceFile

_KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
_GZIP = b"\x1f\x8b"
# Members that describe the whole tar.
_META = re.compile(r"__[^/]*__($|/)")
# No header needs more, such as one with a long name.
_MAX_HEADER_BYTES = 1 << 20
# A member of a compressed tar is in memory as a whole.
_MAX_UNPACKED_BYTES = 4 << 30
_PIECE_BYTES = 1 << 20
# Small members follow each other closely, so several headers are read at once.
_BUFFER_BYTES = 1 << 13


@dataclass(frozen=True, slots=True)
class _Part:
    """A member of a sample: where its bytes are."""

    extension: str
    handle: Handle
    start: int
    stop: int

    @property
    def is_array(self) -> bool:
        return self.extension.rpartition(".")[2] == "npy"

    def bytes(self) -> bytes:
        data = self.handle.read(self.start, self.stop - self.start)
        if len(data) < self.stop - self.start:
            raise ValueError(f"its member {quoted(self.extension)} ends early")
        return data


@dataclass(frozen=True, slots=True)
class _Sample:
    key: str
    parts: list[_Part] = field(default_factory=list)


# How many bytes of a member of a compressed tar are kept: of which sample, by its number, and of which extension.
_Kept = Callable[[int, str], int]


class TarReader:
    """Reads .tar files, also compressed by gzip. Large arrays of tars without compression are read part by part."""

    suffixes = (".tar", ".tar.gz", ".tgz")

    def entries(self, file: SourceFile, select: Selection) -> Iterator[Entry]:
        """Yield the entries of the samples."""

        def kept(number: int, extension: str) -> int:
            return LONGEST_HEADER_BYTES

        for number, sample in enumerate(_samples(file, kept)):
            if isinstance(sample, BadItem):
                if number == 0:
                    raise FileError(f"{file.name}: {sample.reason}")
                yield Entry(sample.key)
                continue
            key, problem = _key(file, sample)
            try:
                part = _array_of(sample, select) if problem is None and not select.raw else None
                shape, _, dtype, _ = (None,) * 4 if part is None else npy_header(part.handle, part.start, part.stop)
            except Exception:
                shape = dtype = None
            yield Entry(key, shape, dtype)

    def read(self, file: SourceFile, select: Selection, *, start: int = 0) -> Iterator[Record]:
        """Yield the samples; of those in front of `start` only the headers are read."""
        every = select.fields or select.raw

        def kept(number: int, extension: str) -> int:
            wanted = every or _matches(extension, select)
            return _MAX_UNPACKED_BYTES if number >= start and wanted else 0

        for number, sample in enumerate(_samples(file, kept)):
            if number >= start:
                yield sample if isinstance(sample, BadItem) else _record(file, sample, select)


def _record(file: SourceFile, sample: _Sample, select: Selection) -> Record:
    key, problem = _key(file, sample)
    if problem is not None:
        return BadItem(key, file.name, problem)
    try:
        if select.raw:
            return RawItem(key, file.name, {part.extension: part.bytes() for part in sample.parts})
        chosen = _array_of(sample, select)
        others = [part for part in sample.parts if part is not chosen] if select.fields else []
        array = stored_npy(chosen.handle, chosen.start, chosen.stop)
        return Item(key, array, file.name, {part.extension: part.bytes() for part in others})
    except Exception as error:
        return BadItem(key, file.name, reason(file, error))


def _key(file: SourceFile, sample: _Sample) -> tuple[str, str | None]:
    """Return the key of a sample, and what is wrong with it; None: nothing."""
    problem = problem_of(sample.key)
    if problem is not None:
        return f"{file.key}/{quoted(sample.key)}", f"the name of the sample {problem}"
    extensions = [part.extension for part in sample.parts]
    if len(set(extensions)) < len(extensions):
        return f"{file.key}/{sample.key}", "two of its members have one extension"
    return f"{file.key}/{sample.key}", None


def _matches(extension: str, select: Selection) -> bool:
    if select.members:
        return any(fnmatchcase(extension, pattern) for pattern in select.members)
    return extension.rpartition(".")[2] == "npy"


def _array_of(sample: _Sample, select: Selection) -> _Part:
    """Return the member of a sample that is its array.

    Raises:
        ValueError: there is none, or several, or it is of another format.
    """
    found = [part for part in sample.parts if _matches(part.extension, select)]
    if len(found) != 1:
        what = "member matches the selection" if select.members else "member is an array (.npy)"
        names = ", ".join(quoted(part.extension) for part in (found or sample.parts)[:8])
        raise ValueError(f"{'more than one' if found else 'no'} {what}: {names}")
    if not found[0].is_array:
        raise ValueError(f"its member {quoted(found[0].extension)} is no .npy array")
    return found[0]


def _samples(file: SourceFile, kept: _Kept) -> Iterator[_Sample | BadItem]:
    """Yield the samples of a tar; the last one is bad if the tar cannot be read on."""
    sample: _Sample | None = None
    number = -1
    try:
        handle = open_source(file)
        is_compressed = handle.read(0, len(_GZIP)) == _GZIP
        compressed = gzip.GzipFile(fileobj=handle.stream(), mode="rb") if is_compressed else None
        for info in _members(compressed or io.BufferedReader(handle.stream(), _BUFFER_BYTES)):
            match = _KEY_AND_EXTENSION.fullmatch(info.name.removeprefix("./"))
            if match is None or not info.isreg() or info.sparse is not None or _META.match(info.name):
                continue
            key, extension = match[1], match[2].lower()
            if sample is None or key != sample.key:
                if sample is not None:
                    yield sample
                sample = _Sample(key)
                number += 1
            if compressed is None:
                part = _Part(extension, handle, info.offset_data, info.offset_data + info.size)
            else:
                data = _unpacked(compressed, info, kept(number, extension))
                part = _Part(extension, MemoryHandle(file.name, data), 0, info.size)
            sample.parts.append(part)
        # The checksum is behind the tar's end.
        while compressed is not None and compressed.read(_PIECE_BYTES):
            pass
    except _Cut as error:
        if sample is not None:
            yield sample
        yield BadItem(file.key, file.name, str(error))
    except Exception as error:
        key = file.key if sample is None else f"{file.key}/{quoted(sample.key)}"
        yield BadItem(key, file.name, f"the tar is damaged, and not read on from here: {reason(file, error)}")
    else:
        yield BadItem(file.key, file.name, "it holds no samples") if sample is None else sample


class _Cut(Exception):
    """A tar ends after a member, without the zeros that every tar ends with."""


def _members(opened: Any) -> Iterator[tarfile.TarInfo]:
    """Yield the headers of a tar.

    Raises:
        _Cut: it may have been cut short.
        Exception: it is damaged.
    """
    stream = _Headers(opened)
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        offset = -1
        while (info := tar.next()) is not None:
            # A negative size would lead back.
            if info.size < 0 or tar.offset <= offset:
                raise ValueError("a header of a member has a wrong size")
            offset = tar.offset
            yield info
            # All that were ever read would be kept.
            tar.members.clear()  # type: ignore[attr-defined]
        # tarfile takes a damaged header for the end.
        stream.seek(tar.offset)
        block = stream.read(tarfile.BLOCKSIZE)
        if not block:
            raise _Cut("the tar has no end: it may have been cut short")
        if any(block):
            raise ValueError(f"no header of a member at byte {tar.offset}")


class _Headers(io.RawIOBase):
    """What tarfile reads of a tar: headers, whose claims of size are not believed."""

    def __init__(self, opened: Any) -> None:
        self._opened = opened

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position: int = self._opened.seek(offset, whence)
        return position

    def tell(self) -> int:
        position: int = self._opened.tell()
        return position

    def read(self, count: int | None = -1) -> bytes:
        if count is None or not 0 <= count <= _MAX_HEADER_BYTES:
            raise ValueError("a header claims to be longer than any is")
        data: bytes = self._opened.read(count)
        return data


def _unpacked(compressed: gzip.GzipFile, info: tarfile.TarInfo, most: int) -> bytes:
    """Return the bytes of a member of a compressed tar, up to a number of them; memory grows as they come."""
    if info.size > _MAX_UNPACKED_BYTES:
        raise ValueError(
            f"a member has {info.size} bytes; of a compressed tar at most {_MAX_UNPACKED_BYTES} are unpacked"
        )
    data = bytearray()
    compressed.seek(info.offset_data)
    while (left := min(info.size, most) - len(data)) > 0:
        piece = compressed.read(min(left, _PIECE_BYTES))
        if not piece:
            raise EOFError("it ends early")
        data += piece
    return bytes(data)
