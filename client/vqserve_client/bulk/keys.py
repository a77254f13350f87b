"""Whether the keys of a data set are unique, and can be files: found before anything is written, in little memory."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator

import numpy as np

from vqserve_data.errors import FileError
from vqserve_data.readers.protocol import SourceFile


class Keys:
    """The keys that were seen, eight bytes each."""

    def __init__(self) -> None:
        self._hashes = array("Q")

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, key: str) -> None:
        """Add the key of an item."""
        self._hashes.append(_hash(key))

    def suspects(self) -> frozenset[int]:
        """Return the hashes that were seen twice."""
        hashes = np.sort(np.frombuffer(self._hashes, np.uint64)) if self._hashes else np.empty(0, np.uint64)
        return frozenset(hashes[1:][hashes[1:] == hashes[:-1]].tolist())


def check_unique(keys: Keys, again: Iterator[tuple[SourceFile, str]]) -> None:
    """Check that no two keys are equal.

    Args:
        keys: all keys.
        again: file and key of each item once more; looked at only if two hashes are equal.

    Raises:
        FileError: names a key and the two files that have it.
    """
    suspects = keys.suspects()
    if not suspects:
        return
    seen: dict[str, str] = {}
    for file, key in again:
        if _hash(key) not in suspects:
            continue
        if key in seen:
            where = f"both in {file.name}" if seen[key] == file.name else f"one in {seen[key]}, one in {file.name}"
            raise FileError(f"two items have the key {key!r}, {where}: keys must differ")
        seen[key] = file.name


class Paths:
    """Whether each key can have a file of its own, in folders as the keys have them."""

    def __init__(self, file_of: Callable[[str], str], taken: frozenset[str]) -> None:
        """Store how files are named.

        Args:
            file_of: returns the name of the file of a key.
            taken: names in the folder of the output that are no folders of items.
        """
        self._file_of = file_of
        self._taken = taken
        # Only these can be a file as well; most keys have none.
        self._folders: set[str] = set()
        self._suffix = file_of("")

    def add(self, file: SourceFile, key: str) -> None:
        """Add the key of an item.

        Raises:
            FileError: its file would be in the place of something else.
        """
        first, slash, _ = key.partition("/")
        if slash and first in self._taken:
            raise FileError(
                f"{file.name}: the key {key!r} begins with {first}/, where the records of an output are: rename that "
                "folder, or use another --format"
            )
        end = key.find(f"{self._suffix}/")
        while end >= 0:
            self._folders.add(key[: end + len(self._suffix)])
            end = key.find(f"{self._suffix}/", end + 1)

    def check(self, again: Iterator[tuple[SourceFile, str]]) -> None:
        """Check that no file is a folder, too.

        Args:
            again: file and key of each item once more; looked at only if it is possible.

        Raises:
            FileError: one is.
        """
        if not self._folders:
            return
        for file, key in again:
            if self._file_of(key) in self._folders:
                raise FileError(
                    f"{file.name}: the key {key!r} needs the file {self._file_of(key)}, and other keys have a folder "
                    "of that name: rename one, or use another --format"
                )


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
