"""What a reader is. A reader of your own is any object with these members."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from vqserve_data.items import Entry, Record


class SourceFile(Protocol):
    """One file (or a folder that counts as one, such as a Zarr store) of a data set."""

    @property
    def name(self) -> str:
        """Path or URL, as the user would write it."""

    @property
    def key(self) -> str:
        """Path below the argument that it was found by, without the suffix of its format: "a/b" of a/b.npy."""

    @property
    def size(self) -> int:
        """Bytes, of a folder those of all its files; 0 if nobody knows."""

    @property
    def version(self) -> str:
        """Text that changes with the content: size and time of a local file, the tag of a remote one."""

    @property
    def path(self) -> Path | None:
        """Local path; None: it is remote."""

    def changed(self) -> bool:
        """Look at it again: whether it was removed, or has another version than when it was found."""

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
        members: patterns (as of a shell) of the names of members of .npz, .safetensors, .pt, HDF5 and Zarr, and of the
            extensions of a sample of a tar;
            none: all arrays, and of a tar the only one of each sample that is an array.
        key: column of a table with the keys; None: the number of the row.
        fields: whether the fields of the items are wanted; without them less is read.
        raw: whether samples of tars, rows of tables and files of other formats are wanted as they are, as RawItems.
    """

    column: str | None = None
    members: tuple[str, ...] = ()
    key: str | None = None
    fields: bool = True
    raw: bool = False


class Reader(Protocol):
    """Reads the files of one format."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of its files, in lower case: (".npy",)."""

    def entries(self, file: SourceFile, select: Selection) -> Iterator[Entry]:
        """Yield what is known of the items of a file without reading their arrays, in their order; bad ones too.

        Raises:
            FileError: the file cannot be read.
        """

    def read(self, file: SourceFile, select: Selection, *, start: int = 0) -> Iterator[Record]:
        """Yield the items of a file in an order that is always the same, that of `entries`.

        Arrays of up to 32 MiB are in memory. Larger ones are read when they are indexed, as long as they are
        referred to, by any thread; of formats that can only be unpacked as a whole they are in memory, too.

        What cannot be read is a BadItem in its place. An error is raised only for what the user must change first.

        Args:
            file: the file.
            select: which of its arrays.
            start: number of items, bad ones too, to leave out at the beginning; they cost as little as possible.

        Raises:
            FileError: the selection does not fit the file, or a library is missing.
        """
