"""`.safetensors` shards, one tensor an item; the codebook is in the metadata of the header."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vqserve_data.drafts import Draft
from vqserve_data.items import Array
from vqserve_data.writers.one_file import OneFile, OneFileWriter, bytes_of, cannot_hold, close_quietly
from vqserve_data.writers.protocol import Shard

_METADATA = "__metadata__"
_NAMES = {
    "bool": "BOOL",
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
}
# Its readers refuse a longer header.
_HEADER_BYTES = 100_000_000
# Of a tensor in the header, beside its name and its shape: `:{"dtype":"F32","shape":[],"data_offsets":[,]},`.
_ENTRY_BYTES = 100
_COPY_BYTES = 1 << 22
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


class SafetensorsWriter(OneFileWriter):
    """Writes .safetensors shards."""

    name = "safetensors"

    def shard(self, folder: Path, number: int, metadata: Mapping[str, str]) -> Shard:
        """Begin a shard."""
        return _SafetensorsShard(folder / self.names(number), metadata)


class _SafetensorsShard(OneFile):
    """The elements go into a file of their own first: the header, which comes before them, is known at the end."""

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        super().__init__(path)
        # JSON as it is written, without its braces: objects of a million items would need ten times as much memory.
        self._header = bytearray()
        if metadata:
            self._add_to_header(_METADATA, dict(sorted(metadata.items())))
        self._header_bytes = len(self._header)
        self._placed: set[str] = {_METADATA}
        self._elements_draft = Draft.of(path.with_name(f"{path.name}.elements"))
        self._elements = self._elements_draft.open()

    def abandon(self) -> None:
        """Remove what was written; after `close` nothing happens."""
        close_quietly(self._elements)
        self._elements_draft.remove()
        super().abandon()

    def _check(self, key: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        if dtype.name not in _NAMES:
            cannot_hold(self._format, key, f"it has no {dtype.name}")
        if key in self._placed:
            cannot_hold(self._format, key, "the name is taken")
        self._header_bytes += _ENTRY_BYTES + len(json.dumps(key)) + 20 * len(shape)
        if self._header_bytes > _HEADER_BYTES:
            cannot_hold(self._format, key, "the header of a shard would be too long: pass a smaller --shard-items")
        self._placed.add(key)

    def _write(self, key: str, array: Array, fields: Mapping[str, Any]) -> None:
        self._elements.write(bytes_of(array))
        entry = {
            "dtype": _NAMES[array.dtype.name],
            "shape": array.shape,
            "data_offsets": (self._nbytes, self._nbytes + array.nbytes),
        }
        self._add_to_header(key, entry)

    def _finish(self) -> None:
        header: list[bytes | bytearray] = [b"{", self._header, b"}"]
        length = sum(map(len, header))
        padding = -length % 8
        self._file.write((length + padding).to_bytes(8, "little"))
        self._file.writelines([*header, b" " * padding])
        self._elements.seek(0)
        shutil.copyfileobj(self._elements, self._file, _COPY_BYTES)
        self._elements.close()
        self._elements_draft.remove()

    def _add_to_header(self, name: str, value: Mapping[str, Any]) -> None:
        separator = b"," if self._header else b""
        self._header += b"%b%b:%b" % (separator, _encode(name).encode(), _encode(value).encode())

    _format = SafetensorsWriter.name
