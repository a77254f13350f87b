"""A stream of tokens: `shard-00000.bin` has those of one item after another, `shard-00000.index.npz` where they are.

`vqserve_data.stream` reads it. The tokens are uint16 or uint32, little-endian, each item's in C order. Those of a
residual codebook are stage by stage if the shape is (n_q, s), and position by position if it is (s, n_q).
"""

from __future__ import annotations

import json
from array import array as growing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vqserve_data.drafts import Draft, publish, writing
from vqserve_data.items import Array
from vqserve_data.writers.npz import NpzFile
from vqserve_data.writers.one_file import OneFile, OneFileWriter, bytes_of, cannot_hold, close_quietly
from vqserve_data.writers.protocol import Shard, Written


class StreamWriter(OneFileWriter):
    """Writes streams of tokens. The metadata is JSON in the index."""

    name = "stream"
    kinds = frozenset({"indices"})

    def names(self, number: int) -> str:
        """Return the name of the file of tokens of a shard."""
        return f"shard-{number:05}.bin"

    def shard(self, folder: Path, number: int, metadata: Mapping[str, str]) -> Shard:
        """Begin a shard."""
        return _StreamShard(folder / self.names(number), metadata)


def index_of(path: Path) -> Path:
    """Return the path of the index of a file of tokens."""
    return path.with_suffix(".index.npz")


class _StreamShard(OneFile):
    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        super().__init__(path)
        self._metadata = dict(metadata)
        self._index_draft = Draft.of(index_of(path))
        self._dtype: np.dtype[Any] | None = None
        self._keys = bytearray()
        # Bytes for each item, not a Python object: there may be millions.
        self._key_ends = growing("q", [0])
        self._token_ends = growing("q", [0])
        self._lengths = growing("q")
        self._length_ends = growing("q", [0])

    def _check(self, key: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        if dtype.kind not in "iu":
            cannot_hold("stream", key, f"it is {dtype.name}, and a stream holds indices only")
        stored = _stored(dtype)
        if self._dtype not in {None, stored}:
            cannot_hold("stream", key, f"it is {dtype.name}, and the items before it are {self._dtype}")
        self._dtype = stored

    def _write(self, key: str, array: Array, fields: Mapping[str, Any]) -> None:
        stored = _stored(array.dtype)
        if array.size and not (array.min() >= 0 and array.max() <= np.iinfo(stored).max):
            cannot_hold("stream", key, f"it has indices below 0 or above {np.iinfo(stored).max}")
        self._file.write(bytes_of(array.astype(stored, copy=False)))
        self._keys += key.encode()
        self._key_ends.append(len(self._keys))
        self._token_ends.append(self._token_ends[-1] + array.size)
        self._lengths.extend(array.shape)
        self._length_ends.append(len(self._lengths))

    def close(self) -> list[Written]:
        """Write all to the disk, and rename both files to their names.

        Raises:
            FileError: they cannot be written; nothing of them is left.
        """
        drafts = [self._draft, self._index_draft]
        try:
            with writing(self._draft.path):
                self._file.close()
            self._write_index()
            written = []
            for draft in drafts:
                with writing(draft.path):
                    written.append(Written(draft.path.name, draft.file.stat().st_size, draft.sha256()))
            publish(drafts)
        except BaseException:
            self.abandon()
            raise
        return written

    def abandon(self) -> None:
        """Remove what was written; after `close` nothing happens."""
        super().abandon()
        self._index_draft.remove()

    def _write_index(self) -> None:
        file = self._index_draft.open()
        try:
            with writing(self._index_draft.path):
                npz = NpzFile(file)
                try:
                    for name, array in self._index():
                        npz.add(name, array)
                    npz.finish()
                finally:
                    npz.abandon()
                file.close()
        finally:
            close_quietly(file)

    def _index(self) -> Iterator[tuple[str, Array]]:
        yield "dtype", np.array(str(self._dtype or np.dtype(np.uint16)))
        yield "offsets", np.array(self._token_ends, "<i8")
        yield "lengths", np.array(self._lengths, "<i8")
        yield "lengths_offsets", np.array(self._length_ends, "<i8")
        yield "keys", np.frombuffer(self._keys, np.uint8)
        yield "keys_offsets", np.array(self._key_ends, "<i8")
        yield "metadata", np.frombuffer(json.dumps(self._metadata, sort_keys=True).encode(), np.uint8)


def _stored(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype("<u2") if dtype.kind == "u" and dtype.itemsize <= 2 else np.dtype("<u4")
