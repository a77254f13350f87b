"""Zip archives from strangers."""

from __future__ import annotations

import stat
import zipfile
from pathlib import Path

from vqserve.errors import ForeignCheckpointError

# Compressions that zipfile unpacks in pieces of limited size. With bzip2 and LZMA a small piece can unpack to any size.
_COMPRESSIONS = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})


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
