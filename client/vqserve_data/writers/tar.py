"""WebDataset shards: tar files in which the members of a sample have its name and an extension each.

The array of sample KEY is `KEY.indices.npy` or `KEY.latents.npy`, and its fields come after it. Their extensions are
those by which WebDataset decodes them: `.txt`, `.cls`, `.json`, `.npy`; bytes keep theirs.
"""

from __future__ import annotations

import base64
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vqserve_data.items import Array
from vqserve_data.keys import sample_of
from vqserve_data.writers.one_file import OneFile, OneFileWriter, bytes_of, kind_of, npy_header
from vqserve_data.writers.protocol import Shard

_END = bytes(2 * tarfile.BLOCKSIZE)


class TarWriter(OneFileWriter):
    """Writes WebDataset shards. The metadata is JSON in the comment of a global header."""

    name = "tar"
    keeps_fields = True

    def shard(self, folder: Path, number: int, metadata: Mapping[str, str]) -> Shard:
        """Begin a shard."""
        return _TarShard(folder / self.names(number), metadata)


class _TarShard(OneFile):
    """The members are written without `tarfile.TarFile`, which would keep an object for each of them."""

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        super().__init__(path)
        # Of the keywords of global headers, tar takes this one without a warning.
        headers = {"comment": json.dumps(dict(metadata), sort_keys=True)}
        self._begin = tarfile.TarInfo.create_pax_global_header(headers) if metadata else b""

    def _write(self, key: str, array: Array, fields: Mapping[str, Any]) -> None:
        self._file.write(self._begin)
        self._begin = b""
        sample = sample_of(key)
        own = f"{kind_of(array.dtype)}.npy"
        self._member(f"{sample}.{own}", npy_header(array), bytes_of(array))
        # Two members of one name would end the reading of the tar.
        taken = {own}
        for extension, content in _members(fields):
            if extension not in taken:
                taken.add(extension)
                self._member(f"{sample}.{extension}", content)

    def _finish(self) -> None:
        # Without a member, tarfile cannot read a global header.
        self._file.write(_END)
        self._file.write(bytes(-self._file.tell() % tarfile.RECORDSIZE))

    def _member(self, name: str, *parts: bytes | memoryview) -> None:
        info = tarfile.TarInfo(name)
        info.size = sum(map(len, parts))
        self._file.write(info.tobuf(tarfile.PAX_FORMAT))
        for part in parts:
            self._file.write(part)
        self._file.write(bytes(-info.size % tarfile.BLOCKSIZE))


def _members(fields: Mapping[str, Any]) -> Iterator[tuple[str, bytes | memoryview]]:
    """Yield the extension and the content of the member of each field."""
    for field, value in fields.items():
        # WebDataset reads extensions in small letters.
        name = re.sub(r"[^\w.+-]", "_", field).strip(".").lower() or "_"
        match value:
            case None:
                continue
            case bytes():
                yield name, value
            case {"bytes": bytes(content), "path": path} if len(value) == 2:
                # A picture or a sound, as `datasets` stores it.
                yield f"{name}{PurePosixPath(path or '').suffix.lower()}", content
            case str():
                yield _with(name, "txt", "text", "transcript"), value.encode(errors="replace")
            case bool():
                yield _with(name, "json"), json.dumps(value).encode()
            case int() | np.integer():
                yield _with(name, "cls", "cls2", "index", "inx", "id"), str(int(value)).encode()
            case np.ndarray() if value.dtype.kind in "biufc":
                content = npy_header(value) + bytes(bytes_of(value))
                yield _with(name, "npy"), content
            case _:
                yield (
                    _with(name, "json"),
                    json.dumps(value, default=_plain).encode(),
                )


def _with(name: str, extension: str, *others: str) -> str:
    """Return a name that ends in an extension of its type."""
    return name if name.rpartition(".")[2] in {extension, *others} else f"{name}.{extension}"


def _plain(value: Any) -> Any:
    """Return what JSON has for a value that it lacks: numbers of numpy as numbers, bytes as base64, a date as text."""
    match value:
        case np.ndarray() | np.generic():
            return value.tolist()
        case bytes():
            return base64.b64encode(value).decode()
        case _:
            return str(value)
