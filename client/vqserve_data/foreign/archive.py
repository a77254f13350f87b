"""Zip archives from strangers."""

from __future__ import annotations

import os
import stat
import struct
import zipfile
from pathlib import Path
from typing import IO

from vqserve.errors import ForeignCheckpointError

# Compressions that zipfile unpacks in pieces of limited size. With bzip2 and LZMA a small piece can unpack to any size.
_COMPRESSIONS = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})
# The end of an archive with 64-bit offsets: end record (56 bytes), its locator (20), and the common end record (22).
_ENDS_BYTES = 56 + 20 + 22
# In front of each member's name.
_HEADER_BYTES = 30
_MAX_DIRECTORY_BYTES = 16 << 20


def check_members(path: Path, archive: zipfile.ZipFile) -> None:
    """Check that members have safe, unique names, are no links, and can be unpacked in pieces.

    Nothing is unpacked to disk, but an archive with names outside its folder is hostile.

    Raises:
        ForeignCheckpointError: a member fails; the error names the first one.
    """
    names = set()
    for member in archive.infolist():
        name = member.filename
        if name.startswith("/") or ".." in name.replace("\\", "/").split("/"):
            raise ForeignCheckpointError(f"{path.name}: its member {name!r} points out of the archive")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise ForeignCheckpointError(f"{path.name}: its member {name!r} is a link, not an array")
        if member.compress_type not in _COMPRESSIONS:
            raise ForeignCheckpointError(
                f"{path.name}: its member {name!r} is compressed by another method than deflate: save it again"
            )
        if name in names:
            raise ForeignCheckpointError(f"{path.name}: it has two members {name!r}")
        names.add(name)


def check_directory(path: Path, file: IO[bytes]) -> None:
    """Check, before it is read, that an archive has one directory, of a reasonable length.

    torch uses the offset in the end record; zipfile uses the directory directly before the end record. A file in which
    they differ means one thing to torch and another to this importer.

    Raises:
        ForeignCheckpointError: the two directories differ, the directory is too long, or data follows the end record.
    """
    length = file.seek(0, os.SEEK_END)
    file.seek(max(length - _ENDS_BYTES, 0))
    tail = file.read()
    end, locator, wide = tail[-22:], tail[-42:-22], tail[-_ENDS_BYTES:-42]
    is_plain = end.startswith(b"PK\5\6") and end.endswith(b"\0\0")
    if locator.startswith(b"PK\6\7"):
        [place] = struct.unpack("<Q", locator[8:16])
        is_plain = is_plain and wide.startswith(b"PK\6\6") and place == length - _ENDS_BYTES
        size, offset, behind = *struct.unpack("<QQ", wide[40:56]), _ENDS_BYTES
    else:
        size, offset, behind = *struct.unpack("<II", end[12:20]), len(end)
    if not is_plain or offset + size != length - behind:
        raise ForeignCheckpointError(f"{path.name}: its archive is not as torch.save writes it: save it again")
    if size > _MAX_DIRECTORY_BYTES:
        raise ForeignCheckpointError(f"{path.name}: its archive's directory has {size} bytes, more than any model's")


def start_of(path: Path, file: IO[bytes], member: zipfile.ZipInfo) -> int:
    """Return where the data of a member that is not compressed begins, in bytes.

    zipfile's own reader refuses members without a checksum, which torch can write.

    Raises:
        ForeignCheckpointError: the header in front of the member differs from the directory, or the file is too short.
    """
    file.seek(member.header_offset)
    header = file.read(_HEADER_BYTES)
    name = member.orig_filename.encode("utf-8" if member.flag_bits & 0x800 else "cp437")
    if len(header) < _HEADER_BYTES or header[:4] != b"PK\3\4" or file.read(len(name)) != name:
        raise ForeignCheckpointError(f"{path.name}: its member {member.filename!r} is not where its directory says")
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    start: int = member.header_offset + _HEADER_BYTES + name_bytes + extra_bytes
    if name_bytes != len(name) or member.compress_size != member.file_size:
        raise ForeignCheckpointError(f"{path.name}: its member {member.filename!r} is not as its directory says")
    if start + member.file_size > file.seek(0, os.SEEK_END):
        raise ForeignCheckpointError(f"{path.name}: its member {member.filename!r} ends early")
    return start
