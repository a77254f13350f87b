"""Whether the keys of a data set are unique, found before anything is written and in little memory."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator

import numpy as np

from vqserve_data.errors import FileError
from vqserve_data.items import Entry
from vqserve_data.readers.protocol import SourceFile

Entries = Iterable[tuple[SourceFile, Entry]]


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


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
