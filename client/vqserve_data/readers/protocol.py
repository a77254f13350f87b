"""What a reader is. A reader of your own is any object with these members."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from vqserve_data.items import BadItem, Entry, Item


class SourceFile(Protocol):
    """One file (or a folder that counts as one, such as a Zarr store) of a data set.

    Attributes:
        name: path or URL, as the user would write it.
        key: path below the argument that it was found by, without the suffix of its format; "a/b" of a/b.npy.
        size: bytes.
        version: text that changes with the content: size and time of a local file, the tag of a remote one.
        path: local path; None: it is remote.
    """

    name: str
    key: str
    size: int
    version: str
    path: Path | None

    def open(self) -> IO[bytes]:
        """Open it for reading; the result can seek.

        Raises:
            FileError: it cannot be opened.
        """


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which arrays of a file are items.

    Attributes:
        column: column of a table with the arrays; None: the only one that can be.
        members: patterns (as of a shell) of the names of members of .npz, .safetensors, .pt, HDF5, Zarr and tars;
            none: all arrays, and of a tar the only one of each sample that is an array.
        key: column of a table with the keys; None: the number of the row.
    """

    column: str | None = None
    members: tuple[str, ...] = ()
    key: str | None = None


class Reader(Protocol):
    """Reads the files of one format.

    Attributes:
        suffixes: suffixes of its files: (".npy",).
    """

    suffixes: tuple[str, ...]

    def entries(self, file: SourceFile, select: Selection) -> Iterator[Entry]:
        """Yield what is known of the items of a file without reading their arrays, in their order.

        Raises:
            FileError: the file cannot be read.
        """

    def read(self, file: SourceFile, select: Selection, *, start: int = 0) -> Iterator[Item | BadItem]:
        """Yield the items of a file in an order that is always the same.

        What cannot be read is a BadItem in its place. An error is raised only for what the user must change first.

        Args:
            file: the file.
            select: which of its arrays.
            start: number of items, bad ones too, to leave out at the beginning; they cost as little as possible.

        Raises:
            FileError: the selection does not fit the file, or a library is missing.
        """
