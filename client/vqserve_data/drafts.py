"""The one way to write a file: under a draft name, which becomes its name only when it is complete and on the disk.

A process that is killed leaves drafts, which are named `.NAME.part`, never a part of a file under its own name.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from vqserve_data.errors import FileError

SUFFIX = ".part"
_SYNCS = 8


@dataclass(frozen=True, slots=True)
class Draft:
    """A file to be.

    Attributes:
        path: its name when it is complete.
        file: path of its draft, in the same folder.
    """

    path: Path
    file: Path

    @classmethod
    def of(cls, path: Path) -> Draft:
        """Return the draft of a file that only this process writes; it replaces what an earlier one has left."""
        return cls(path, path.with_name(f".{path.name}{SUFFIX}"))

    @classmethod
    def unshared(cls, path: Path) -> Draft:
        """Return a draft with a name of its own, for a file that several processes may write at the same time."""
        return cls(path, path.with_name(f".{path.name}.{secrets.token_hex(4)}{SUFFIX}"))

    def open(self) -> IO[bytes]:
        """Create the draft, or empty it, and open it for reading and writing.

        Raises:
            FileError: it cannot be created.
        """
        with writing(self.path):
            return self.file.open("w+b", buffering=1 << 20)

    def sha256(self) -> str:
        """Return the SHA-256 of its content, in hex.

        Raises:
            FileError: it cannot be read.
        """
        with writing(self.path), self.file.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def remove(self) -> None:
        """Remove the draft, if it is there."""
        with contextlib.suppress(OSError):
            self.file.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of the operating system in this block into ones about the file that is written.

    Raises:
        FileError: the block has raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error


def publish(drafts: Sequence[Draft], *, root: Path | None = None) -> None:
    """Write complete drafts to the disk and give them their names, all or none.

    Args:
        drafts: the drafts, which no process writes any longer.
        root: folder below which folders may be new, so that their names are written to the disk, too; None: none is.

    Raises:
        FileError: they cannot be written; neither the drafts nor the files are left. If it is only the names of their
            folder that cannot be written to the disk, the files are left.
    """
    done: list[Draft] = []
    try:
        # Syncs at the same time share the commits of a journal: 1,000 small files took 0.13 s in place of 4.2 s.
        with ThreadPoolExecutor(_SYNCS) as pool:
            list(pool.map(_sync_draft, drafts))
        for draft in drafts:
            with writing(draft.path):
                draft.file.replace(draft.path)
            done.append(draft)
    except BaseException:
        for draft in drafts:
            draft.remove()
        for draft in done:
            with contextlib.suppress(OSError):
                draft.path.unlink(missing_ok=True)
        raise
    for folder in sorted(_folders(drafts, root)):
        with writing(folder):
            _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def write_file(path: Path, content: Iterable[bytes]) -> None:
    """Write a file that is there as a whole or not at all.

    Raises:
        FileError: it cannot be written; what was there is still there.
    """
    draft = Draft.unshared(path)
    try:
        with writing(path), draft.open() as file:
            file.writelines(content)
        publish([draft])
    finally:
        draft.remove()


def is_draft_of(path: Path, name: str) -> bool:
    """Return whether a path is that of a draft of a file with this name."""
    return path.name.startswith(f".{name}.") and path.name.endswith(SUFFIX)


def drafts_below(folder: Path) -> Iterator[Path]:
    """Yield the drafts in a folder and its folders: what processes that were killed have left."""
    for path in folder.rglob(f".*{SUFFIX}"):
        if path.is_file() and not path.is_symlink():
            yield path


def _folders(drafts: Sequence[Draft], root: Path | None) -> set[Path]:
    folders = {draft.path.parent for draft in drafts}
    if root is not None:
        folders |= {parent for folder in folders for parent in folder.parents if parent.is_relative_to(root)}
    return folders


def _sync_draft(draft: Draft) -> None:
    with writing(draft.path):
        _sync(draft.file, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync folders; then there is nothing that could be done.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)
