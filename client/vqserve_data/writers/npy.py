"""Mirrored `.npy` files: item a/b is OUT/a/b.npy."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vqserve_data.drafts import Draft, publish, writing
from vqserve_data.errors import FileError
from vqserve_data.files import map_draft
from vqserve_data.items import Array
from vqserve_data.writers.one_file import bytes_of, check_key, npy_header
from vqserve_data.writers.protocol import Shard, Written

# A larger array is mapped; of a smaller one, mapping would cost more than it saves.
_MAPPED_BYTES = 1 << 20


class NpyWriter:
    """Writes one .npy file an item, in folders that are made as needed."""

    name = "npy"
    kinds = frozenset({"indices", "latents"})
    keeps_fields = False

    def shard(self, folder: Path, number: int, metadata: Mapping[str, str]) -> Shard:
        """Begin a shard: files that appear together. Neither the number nor the metadata is written."""
        return _NpyShard(folder)

    def names(self, number: int) -> str | None:
        """Return None: the files are named by the keys."""
        return None

    def file_of(self, key: str) -> str:
        """Return the name of the file of an item."""
        return f"{key}.npy"


class _NpyShard:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._root = folder.resolve()
        self._folders = {folder}
        self._made: list[Path] = []
        self._drafts: dict[str, Draft] = {}
        self._added: list[str] = []
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that were added."""
        return self._nbytes

    def place(self, key: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return an array to fill for an item: mapped, or in memory if it is small.

        Raises:
            FileError: the key is no path below the folder, or the disk is full.
        """
        check_key(key)
        path = self._folder / f"{key}.npy"
        self._make(path.parent)
        draft = Draft.of(path)
        if key in self._drafts:
            raise FileError(f"two items have the key {key}")
        self._drafts[key] = draft
        array: Array = np.empty((), dtype.newbyteorder("<"))
        if np.prod(shape, dtype=float) * array.itemsize < _MAPPED_BYTES:
            return np.empty(shape, array.dtype)
        return map_draft(draft, shape, array.dtype)

    def add(self, key: str, array: Array, fields: Mapping[str, Any]) -> None:
        """Add an item that has its place; the fields are left out.

        Raises:
            FileError: it cannot be written.
        """
        draft = self._drafts[key]
        # Which pages of a mapped array are on the disk does not matter before `close`.
        if not isinstance(array, np.memmap):
            with writing(draft.path), draft.file.open("wb") as file:
                file.write(npy_header(array))
                file.write(bytes_of(array))
        self._added.append(key)
        self._nbytes += array.nbytes

    def close(self) -> list[Written]:
        """Write all to the disk, and rename the files to their names.

        Raises:
            FileError: they cannot be written; nothing of them is left.
        """
        try:
            drafts = [self._drafts[key] for key in self._added]
            written = []
            for key, draft in zip(self._added, drafts, strict=True):
                with writing(draft.path):
                    written.append(Written(f"{key}.npy", draft.file.stat().st_size, draft.sha256()))
            publish(drafts, root=self._folder)
        except BaseException:
            self.abandon()
            raise
        self._made.clear()
        self.abandon()
        return written

    def abandon(self) -> None:
        """Remove what was written, and the folders that were made for it; after `close` nothing happens."""
        for draft in self._drafts.values():
            draft.remove()
        self._drafts.clear()
        for folder in reversed(self._made):
            # It stays if somebody else has put something into it.
            with contextlib.suppress(OSError):
                folder.rmdir()
        self._made.clear()

    def _make(self, folder: Path) -> None:
        if folder in self._folders:
            return
        self._make(folder.parent)
        with writing(folder):
            if not folder.is_dir():
                folder.mkdir()
                self._made.append(folder)
            if not folder.resolve().is_relative_to(self._root):
                raise FileError(f"{folder} is a link that leads out of {self._folder}")
        self._folders.add(folder)
