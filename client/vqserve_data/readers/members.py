"""What the readers of files with several arrays by name have in common: .npz, .safetensors, .pt, HDF5, Zarr."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from vqserve_data.errors import FileError, MissingLibrary, UnfitSelection
from vqserve_data.items import BadItem, Entry, Record, SourceArray
from vqserve_data.keys import problem_of, quoted
from vqserve_data.readers.handle import item_or_bad, reason
from vqserve_data.readers.protocol import Selection, SourceFile

_MOST_NAMED = 8


@dataclass(frozen=True, slots=True)
class Member:
    """An array of a file, not read yet. Its functions may raise errors of any type: then it is a bad one.

    Attributes:
        name: its name; "": the file has one array without a name.
        look: returns its shape and the type of its elements.
        array: returns the array.
    """

    name: str
    look: Callable[[], tuple[tuple[int, ...], np.dtype[Any]]]
    array: Callable[[], SourceArray]


class MembersReader(ABC):
    """Reads the files of a format whose arrays have names."""

    suffixes: tuple[str, ...]

    @abstractmethod
    def members(self, file: SourceFile) -> Sequence[Member]:
        """Return the arrays of a file in an order that is always the same.

        Raises:
            MissingLibrary: the format needs one that is not installed.
            Exception: the file cannot be read; libraries raise errors of any type for strangers' files.
        """

    def entries(self, file: SourceFile, select: Selection) -> Iterator[Entry]:
        """Yield the entries of the selected arrays."""
        members = self._members(file)
        if isinstance(members, BadItem):
            raise FileError(f"{file.name}: {members.reason}")
        for member in _selected(file, members, select):
            key, problem = _key(file, member)
            try:
                look = member.look() if problem is None else (None, None)
            except Exception:
                look = None, None
            yield Entry(key, *look)

    def read(self, file: SourceFile, select: Selection, *, start: int = 0) -> Iterator[Record]:
        """Yield the selected arrays; those in front of `start` are not read."""
        members = self._members(file)
        if isinstance(members, BadItem):
            yield from [members][start:]
            return
        for member in _selected(file, members, select)[start:]:
            key, problem = _key(file, member)
            yield item_or_bad(key, file, member.array) if problem is None else BadItem(key, file.name, problem)

    def _members(self, file: SourceFile) -> Sequence[Member] | BadItem:
        try:
            members = self.members(file)
        except MissingLibrary:
            raise
        except Exception as error:
            return BadItem(file.key, file.name, reason(file, error))
        return members or BadItem(file.key, file.name, "it holds no arrays")


def _selected(file: SourceFile, members: Sequence[Member], select: Selection) -> Sequence[Member]:
    if not select.members:
        return members
    selected = [
        member
        for member in members
        if not member.name or any(fnmatchcase(member.name, pattern) for pattern in select.members)
    ]
    if not selected:
        names = ", ".join(quoted(member.name) for member in members[:_MOST_NAMED])
        more = ", ..." if len(members) > _MOST_NAMED else ""
        raise UnfitSelection(f"{file.name}: no member matches {' or '.join(select.members)}; it has {names}{more}")
    return selected


def _key(file: SourceFile, member: Member) -> tuple[str, str | None]:
    """Return the key of a member, and what is wrong with its name; None: nothing."""
    if not member.name:
        return file.key, None
    problem = problem_of(member.name)
    if problem is not None:
        return f"{file.key}/{quoted(member.name)}", f"the name of the member {problem}"
    return f"{file.key}/{member.name}", None
