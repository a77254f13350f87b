"""Archives of arrays, as numpy.savez and numpy.savez_compressed write them."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from vqserve.npy import read_header
from vqserve_data.items import Array, SourceArray
from vqserve_data.readers.handle import MOST_OF_A_BYTE, WHOLE_BYTES, Handle, check_numbers, open_source, stored_npy
from vqserve_data.readers.members import Member, MembersReader
from vqserve_data.readers.protocol import SourceFile

# A member that is unpacked is in memory as a whole.
_MAX_UNPACKED_BYTES = 4 << 30
# In front of each member's name.
_LOCAL_HEADER_BYTES = 30


class NpzReader(MembersReader):
    """Reads .npz files. Large members are read part by part if they are not compressed."""

    suffixes = (".npz",)

    def members(self, file: SourceFile) -> Sequence[Member]:
        """Return the members of an archive in their order in it; what is no .npy is left out."""
        handle = open_source(file)
        archive = zipfile.ZipFile(handle.stream())
        return [
            Member(
                info.filename.removesuffix(".npy"),
                partial(_look, archive, info),
                partial(_array, handle, archive, info),
            )
            for info in archive.infolist()
            if info.filename.endswith(".npy")
        ]


def _look(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype[Any]]:
    with _opened(archive, info) as member:
        shape, _, dtype = read_header(member)
    check_numbers(dtype)
    return shape, dtype


def _opened(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Any:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("it is compressed by another method than deflate")
    return archive.open(info)


def _array(handle: Handle, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> SourceArray:
    if info.compress_type == zipfile.ZIP_STORED and info.file_size > WHOLE_BYTES and not info.flag_bits & 1:
        start = _start(handle, info)
        return stored_npy(handle, start, start + info.file_size)
    if info.file_size > _MAX_UNPACKED_BYTES:
        raise ValueError(f"it has {info.file_size} bytes compressed; at most {_MAX_UNPACKED_BYTES} are unpacked")
    with _opened(archive, info) as member:
        shape, is_fortran, dtype = read_header(member)
        check_numbers(dtype)
        return _unpacked(member, shape, dtype, is_fortran=is_fortran, most=info.compress_size * MOST_OF_A_BYTE)


def _unpacked(member: Any, shape: tuple[int, ...], dtype: np.dtype[Any], *, is_fortran: bool, most: int) -> Array:
    """Read an array; compared with what the compressed bytes can hold before memory is allocated."""
    nbytes = dtype.itemsize
    for length in shape:
        nbytes *= length
    if nbytes > most:
        raise ValueError(f"an array of shape {shape} needs {nbytes} bytes and it has less: it is incomplete")
    array: Array = np.empty(shape[::-1] if is_fortran else shape, dtype)
    buffer = array.reshape(-1).view(np.uint8).data
    while buffer:
        count = member.readinto(buffer)
        if not count:
            raise ValueError("it is incomplete")
        buffer = buffer[count:]
    # The checksum is compared at the end of the member.
    if member.read(1):
        raise ValueError("it has more bytes than its header says")
    return array.T if is_fortran else array


def _start(handle: Handle, info: zipfile.ZipInfo) -> int:
    """Return where the bytes of a member begin."""
    header = handle.read(info.header_offset, _LOCAL_HEADER_BYTES)
    if len(header) < _LOCAL_HEADER_BYTES or not header.startswith(b"PK\3\4"):
        raise ValueError("it is not where the directory of the archive says")
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    start: int = info.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
    return start
