"""What a user names - files, folders, globs, URLs - as the files of a data set, in an order that is always the same."""

from __future__ import annotations

import glob
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from vqserve.text import printable
from vqserve_data.errors import FileError
from vqserve_data.keys import problem_of, quoted
from vqserve_data.readers import SUFFIXES, suffix_of
from vqserve_data.readers.protocol import SourceFile
from vqserve_data.remote import RemoteFile, is_url, list_url

__all__ = ["Found", "LocalFile", "RemoteFile", "find"]

# A folder that counts as one file.
_STORE = ".zarr"


@dataclass(frozen=True, slots=True)
class Found:
    """What the arguments of a command name.

    Attributes:
        files: in the order of the arguments; those of a folder or a glob are sorted by the parts of their paths.
        skipped: names of files in folders and globs that no reader can read.
    """

    files: list[SourceFile]
    skipped: list[str]


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file on this machine, or a folder that counts as one."""

    path: Path
    key: str
    size: int
    version: str

    @property
    def name(self) -> str:
        """Path, as the user would write it."""
        return str(self.path)

    def changed(self) -> bool:
        """Look at it again: whether it was removed, or has another version than when it was found."""
        return _stamp(self.path)[1] != self.version

    def open(self) -> IO[bytes]:
        """Open it for reading.

        Raises:
            FileError: it cannot be opened.
        """
        try:
            # A pipe, which may have come in its place since it was found, would be waited for without end.
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return os.fdopen(descriptor, "rb")
            os.close(descriptor)
        except OSError as error:
            raise FileError(f"cannot read {self.path}: {error.strerror or error}") from error
        raise FileError(f"cannot read {self.path}: it is no file")


class _Path(Protocol):
    """What an argument names, before it has a key."""

    @property
    def name(self) -> str:
        """Path or URL."""

    @property
    def relative(self) -> str:
        """Path below the folder that was named, or below the fixed part of the pattern; of a file its name."""

    def with_key(self, key: str) -> SourceFile:
        """Return the file."""


@dataclass(frozen=True, slots=True)
class _LocalPath:
    path: Path
    relative: str

    @property
    def name(self) -> str:
        return str(self.path)

    def with_key(self, key: str) -> LocalFile:
        return LocalFile(self.path, key, *_stamp(self.path))


def find(arguments: Sequence[str], *, any_suffix: bool = False) -> Found:
    """Return the files that arguments name.

    Names that begin with a dot are not looked at in folders and globs. A folder `NAME.zarr` counts as one file.

    Args:
        arguments: paths of files and folders, patterns as of a shell (`**`: any folders), and URLs that fsspec knows.
        any_suffix: whether files that no reader knows are read, too, as their bytes.

    Raises:
        FileError: an argument names nothing, or nothing that can be read, two files have one key, or a name cannot be
            a key.
    """
    files: dict[str, SourceFile] = {}
    skipped: list[str] = []
    for argument in arguments:
        paths: Sequence[_Path]
        if is_url(argument):
            is_file = suffix_of(argument) is not None
            paths, is_named = list_url(argument, is_file=is_file, store=_STORE)
        else:
            paths, is_named = _list_local(argument)
        known = [path for path in paths if any_suffix or suffix_of(path.name) is not None]
        if not known:
            what = "is of an unknown suffix" if is_named else "has no file that can be read"
            raise FileError(f"{argument} {what}: the suffixes that are read are {', '.join(sorted(SUFFIXES))}")
        skipped += [path.name for path in paths if not any_suffix and suffix_of(path.name) is None]
        for path in sorted(known, key=lambda path: path.relative.split("/")):
            _add(files, path)
    return Found(list(files.values()), skipped)


def _add(files: dict[str, SourceFile], path: _Path) -> None:
    suffix = suffix_of(path.name) or PurePosixPath(path.relative).suffix
    key = path.relative[: len(path.relative) - len(suffix)]
    problem = problem_of(key)
    if problem is not None:
        raise FileError(f"{printable(path.name)}: its key {quoted(key)!r} {problem}: rename it")
    if key in files:
        if files[key].name == path.name:
            raise FileError(f"{path.name} is named twice: name it once")
        raise FileError(
            f"{files[key].name} and {path.name} have the same key, {key!r}: name the folder above them, or rename one"
        )
    files[key] = path.with_key(key)


def local_path(argument: str) -> Path:
    """Return the path that an argument is if it is no other URL; it may be a pattern."""
    return Path(argument.removeprefix("file://"))


def _list_local(argument: str) -> tuple[Sequence[_Path], bool]:
    """Return what a path or pattern names, and whether it is one file that it names itself.

    Raises:
        FileError: there is nothing.
    """
    path = local_path(argument)
    if _is_folder(path):
        return list(_walk(path, "")), False
    if path.exists() or path.is_symlink():
        if not path.is_file() and path.exists() and not path.is_dir():
            raise FileError(f"{path} is a device or a pipe: name a file")
        return [_LocalPath(path, path.name)], True
    if not glob.has_magic(str(path)):
        raise FileError(f"{path}: there is no such file")
    base = Path(*path.parts[: next(at for at, part in enumerate(path.parts) if glob.has_magic(part))])
    found: dict[Path, _LocalPath] = {}
    # Path.glob finds hidden files, too.
    for match in map(Path, glob.iglob(str(path), recursive=True)):  # noqa: PTH207
        relative = match.relative_to(base).as_posix()
        below = _walk(match, f"{relative}/") if _is_folder(match) else [_LocalPath(match, relative)]
        # With ** a folder is matched and what is in it, too.
        found |= {each.path: each for each in below}
    if not found:
        raise FileError(f"{path} matches nothing")
    return list(found.values()), False


def _is_folder(path: Path) -> bool:
    return path.is_dir() and path.suffix.lower() != _STORE


def _walk(folder: Path, prefix: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[_LocalPath]:
    """Yield the files below a folder, not those in a folder that is a link to one above it.

    Raises:
        FileError: a folder cannot be listed.
    """
    try:
        status = folder.stat()
        with os.scandir(folder) as scan:
            entries = [entry for entry in scan if not entry.name.startswith(".")]
    except OSError as error:
        raise FileError(f"cannot read {folder}: {error.strerror or error}") from error
    own = (status.st_dev, status.st_ino)
    if own in above:
        return
    for entry in entries:
        path = folder / entry.name
        relative = f"{prefix}{entry.name}"
        # Of a link that leads to itself, entry.is_dir raises an error.
        is_folder = path.is_dir() if entry.is_symlink() else entry.is_dir()
        if is_folder and _is_folder(path):
            yield from _walk(path, f"{relative}/", above | {own})
        elif is_folder or _is_file_or_broken_link(entry):
            yield _LocalPath(path, relative)


def _is_file_or_broken_link(entry: os.DirEntry[str]) -> bool:
    try:
        return stat.S_ISREG(entry.stat().st_mode)
    except OSError:
        return entry.is_symlink()


def _stamp(path: Path) -> tuple[int, str]:
    """Return the size of a file and the text that changes with its content; what cannot be looked at has none."""
    try:
        status = path.stat()
        if not path.is_dir():
            return status.st_size, f"{status.st_size}-{status.st_mtime_ns}"
        lines = []
        size = 0
        for folder, _, names in os.walk(path):
            for name in names:
                each = Path(folder, name)
                status = each.stat()
                size += status.st_size
                lines.append(f"{each.relative_to(path).as_posix()}:{status.st_size}-{status.st_mtime_ns}")
        return size, _hash(sorted(lines))
    except OSError:
        return 0, "missing"


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
