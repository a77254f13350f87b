"""`.npz` shards: zip files without compression, one member an item, as `numpy.load` reads them."""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from vqserve_data.items import Array
from vqserve_data.writers.one_file import OneFile, OneFileWriter, bytes_of, cannot_hold, npy_header
from vqserve_data.writers.protocol import Shard

# The comment of a zip file has 16 bits for its length.
_COMMENT_BYTES = 65_535


class NpzWriter(OneFileWriter):
    """Writes .npz shards. The metadata is JSON in the comment of the zip file."""

    name = "npz"

    def shard(self, folder: Path, number: int, metadata: Mapping[str, str]) -> Shard:
        """Begin a shard."""
        return _NpzShard(folder / self.names(number), metadata)


class NpzFile:
    """A .npz file that is written member by member; the same members give the same bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._zip = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)

    def add(self, name: str, array: Array) -> None:
        """Add an array."""
        # Its time is that of the epoch of zip files, 1980; the rest of what ZipInfo takes from the machine is set here.
        member = zipfile.ZipInfo(f"{name}.npy")
        member.create_system, member.external_attr = 3, 0o644 << 16
        header, elements = npy_header(array), bytes_of(array)
        member.file_size = len(header) + len(elements)
        with self._zip.open(member, "w") as out:
            out.write(header)
            out.write(elements)

    def finish(self, comment: bytes = b"") -> None:
        """Write the table of contents."""
        self._zip.comment = comment
        self._zip.close()

    def abandon(self) -> None:
        """Give up; what is written is not a zip file."""
        with contextlib.suppress(OSError, ValueError):
            self._zip.close()


class _NpzShard(OneFile):
    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        super().__init__(path)
        self._npz = NpzFile(self._file)
        self._comment = json.dumps(dict(metadata), sort_keys=True).encode()
        self._members: set[str] = set()

    def _check(self, key: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        # numpy finds a member by its name with .npy and without.
        for other in (key, f"{key}.npy", key.removesuffix(".npy")):
            if other in self._members:
                cannot_hold("npz", key, f"numpy would take it for {other}")
        self._members.add(key)

    def _write(self, key: str, array: Array, fields: Mapping[str, Any]) -> None:
        self._npz.add(key, array)

    def _finish(self) -> None:
        self._npz.finish(self._comment if len(self._comment) <= _COMMENT_BYTES else b"")

    def abandon(self) -> None:
        """Remove what was written; after `close` nothing happens."""
        self._npz.abandon()
        super().abandon()
