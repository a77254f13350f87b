"""What a writer is. A writer of your own is any object with these members."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vqserve_data.items import Array


@dataclass(frozen=True, slots=True)
class Written:
    """A file that was written.

    Attributes:
        name: path relative to the folder of the output, with slashes.
        nbytes: its size.
        sha256: hex digest of its content.
    """

    name: str
    nbytes: int
    sha256: str


class Shard(Protocol):
    """Files of an output that appear together: of most formats one, of mirrored .npy one an item.

    The same items in the same order give the same bytes: no times, no names of machines.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that were added."""

    def place(self, key: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return an array to fill for the next item; of a format of one array a file it is mapped, else in memory.

        Raises:
            FileError: the format cannot hold it, or the disk is full.
        """

    def add(self, key: str, array: Array, fields: Mapping[str, Any]) -> None:
        """Add the next item. Fields that the format cannot hold are left out.

        Args:
            key: its key.
            array: what `place` returned, filled.
            fields: what else belongs to it.

        Raises:
            FileError: it cannot be written.
        """

    def close(self) -> list[Written]:
        """Write all to the disk (fsync), and rename the files to their names; return what was written.

        Raises:
            FileError: it cannot be written; nothing of it is left.
        """

    def abandon(self) -> None:
        """Remove what was written; after `close` nothing happens."""


class Writer(Protocol):
    """Writes the shards of one format.

    Attributes:
        name: name of the format: "npy".
        kinds: "indices", "latents": what it can hold.
        keeps_fields: whether captions, labels and so on travel along.
    """

    name: str
    kinds: frozenset[str]
    keeps_fields: bool

    def shard(self, folder: Path, number: int, metadata: Mapping[str, str]) -> Shard:
        """Begin shard number `number` in a folder, which exists.

        Args:
            folder: folder of the output. Drafts in it are named `.NAME.part`; a process that is killed leaves them.
            number: number of the shard, from 0.
            metadata: which codebook and options made the arrays; written where the format has a place for it.
        """

    def names(self, number: int) -> str | None:
        """Return the name of the file of a shard; None: its files are named by the keys."""

    def file_of(self, key: str) -> str:
        """Return the name of the file of an item, where `names` returns None."""
