"""What a job writes about its output, so that it can go on after any end: the manifest and one record file a part.

A part is a run of items whose files appear together. It counts when its record file is there, which is renamed to its
name after the files of the part. So a job that was killed leaves whole parts, and perhaps files that no record names.
Nothing in these files depends on the time or on the machine: the same job leaves the same bytes, killed or not.

    OUT/manifest.json               what the job is: codebook, options, sources; whether it is complete
    OUT/manifest/sources.jsonl      the files that are read, in order
    OUT/manifest/part-00000.jsonl   a line about the part, then one for each of its items
    OUT/errors.jsonl                the items without a result, and why
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from vqserve_client.bulk.differences import job_differences, some_of, source_differences
from vqserve_client.provenance import checked
from vqserve_data.drafts import drafts_below, is_draft_of, write_file
from vqserve_data.errors import FileError
from vqserve_data.keys import problem_of, quoted
from vqserve_data.readers.protocol import SourceFile
from vqserve_data.writers.protocol import Written

MANIFEST = "manifest.json"
ERRORS = "errors.jsonl"
_FOLDER = "manifest"
# Names in the folder of an output that no item may use for a folder of its own.
RESERVED = frozenset({MANIFEST, ERRORS, _FOLDER})
_SOURCES = "sources.jsonl"
# Version of the form of these files.
_FORM = 1
_encode = json.JSONEncoder(separators=(",", ":")).encode


class Position(NamedTuple):
    """A place in the sources: so many items of this file, and all of the files before it, are behind it."""

    file: int
    items: int


@dataclass(frozen=True)
class Part:
    """The first line of a record file.

    Attributes:
        files: what was written.
        end: the place in the sources after its last item.
        items: items with a result.
        bad: items without one.
        tokens: tokens of the items.
    """

    files: tuple[Written, ...]
    end: Position
    items: int
    bad: int
    tokens: int

    def line(self) -> str:
        """Return it as a line of JSON."""
        return line_of(
            {
                "files": [{"name": file.name, "bytes": file.nbytes, "sha256": file.sha256} for file in self.files],
                "end": list(self.end),
                "items": self.items,
                "bad": self.bad,
                "tokens": self.tokens,
            }
        )

    @classmethod
    def of_line(cls, line: str) -> Part:
        """Return the part that a line describes.

        Raises:
            ValueError, KeyError, TypeError: it describes none.
        """
        fields = json.loads(line)
        files = tuple(Written(file["name"], file["bytes"], file["sha256"]) for file in fields["files"])
        return cls(files, Position(*fields["end"]), fields["items"], fields["bad"], fields["tokens"])


class Records:
    """The records of one output folder, for the one job that may write there.

    Attributes:
        folder: the folder.
        parts: the parts that are whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: list[Part] = []
        self._lock: int | None = None

    @property
    def end(self) -> Position:
        """The place in the sources behind the last whole part."""
        return self.parts[-1].end if self.parts else Position(0, 0)

    def open(self, job: Mapping[str, Any], sources: Sequence[SourceFile], *, restart: bool) -> None:
        """Begin an output, or go on with it.

        Args:
            job: what the job is, as JSON: the same job is needed to go on.
            sources: the files that are read.
            restart: whether the output of another job in the folder is removed.

        Raises:
            FileError: the folder has something else in it, or the output of another job.
        """
        if self.folder.exists() and not self.folder.is_dir():
            what = "a file" if self.folder.is_file() else "a device or a pipe"
            raise FileError(f"{self.folder} is {what}: name a folder, or NAME.npy to write one array")
        if self.folder.is_dir() and read_manifest(self.folder) is None:
            self._check_empty()
        if (self.folder / _FOLDER).is_symlink():
            raise FileError(f"{self.folder / _FOLDER} is a link: the records of an output are in the output")
        with _named(self.folder):
            (self.folder / _FOLDER).mkdir(parents=True, exist_ok=True)
            self._take_lock()
        before = read_manifest(self.folder)
        # The output of a job that has no result, such as one with a wrong option, is nothing to protect.
        if before is not None and (restart or not has_results(self.folder)):
            self._remove()
            before = None
        if before is None:
            listed = map(str.encode, map(_source_line, sources))
            write_file(self.folder / _FOLDER / _SOURCES, listed)
            self._write_manifest(job)
            return
        self.parts = begun_parts(self.folder, job, sources)

    def check(self) -> None:
        """Check that the files of the whole parts are as they were written; remove what belongs to no whole part.

        Raises:
            FileError: a file is missing or was changed.
        """
        for part in self.parts:
            for file in part.files:
                check_file(self.folder, file)
        for path in drafts_below(self.folder):
            path.unlink()
        for path in (self.folder / _FOLDER).glob("part-*.jsonl"):
            if _part_number(path) >= len(self.parts):
                path.unlink()

    def add(self, part: Part, lines: Iterable[str]) -> None:
        """Add a part, whose files are in place, with a `line_of` each of its items.

        Raises:
            FileError: it cannot be written.
        """
        path = self.folder / _FOLDER / _part_name(len(self.parts))
        write_file(path, map(str.encode, chain([part.line()], lines)))
        self.parts.append(part)

    def finish(self, job: Mapping[str, Any]) -> None:
        """Write errors.jsonl, and the manifest of a complete output."""
        self.write_errors()
        totals = {name: sum(getattr(part, name) for part in self.parts) for name in ("items", "bad", "tokens")}
        self._write_manifest(job, complete=True, parts=len(self.parts), **totals)

    def write_errors(self, more: Iterable[Mapping[str, Any]] = ()) -> None:
        """Write the list of the items without a result, `more` after those of the parts; without any, remove it."""
        # Ctrl-C waits for this, so parts without such items are not read.
        with_bad = [number for number, part in enumerate(self.parts) if part.bad]
        lines = (line for number in with_bad for line in read_records(self.folder, number) if "reason" in line)
        bad = map(line_of, chain(lines, more))
        first = next(bad, None)
        if first is None:
            (self.folder / ERRORS).unlink(missing_ok=True)
        else:
            write_file(self.folder / ERRORS, map(str.encode, chain([first], bad)))

    def close(self) -> None:
        """Let other jobs write to the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> None:
        self._lock = os.open(self.folder / _FOLDER, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise FileError(f"another job writes to {self.folder}: wait for its end, or name another folder") from None
        except OSError:
            # Some network file systems have no locks.
            return

    def _check_empty(self) -> None:
        # A job that was killed before it had written its manifest has left the folder, and perhaps a draft.
        if any(path.name != _FOLDER and not is_draft_of(path, MANIFEST) for path in self.folder.iterdir()):
            raise FileError(
                f"{self.folder} is not empty, and is no output of a job: name a new folder, or an empty one"
            )

    def _remove(self) -> None:
        """Remove the output of a job, and nothing else.

        The manifest goes last, and the records of parts after their files: a job that is killed meanwhile leaves what
        the next one with --force can remove.

        Raises:
            FileError: a record file is damaged, or names a file elsewhere.
        """
        paths = [file_below(self.folder, file.name) for part, _ in read_parts(self.folder) for file in part.files]
        folders: set[Path] = set()
        for path in paths:
            path.unlink(missing_ok=True)
            folders |= {folder for folder in path.parents if folder.is_relative_to(self.folder)}
        for path in drafts_below(self.folder):
            path.unlink()
        records = self.folder / _FOLDER
        for path in [*records.glob("part-*.jsonl"), records / _SOURCES, self.folder / ERRORS, self.folder / MANIFEST]:
            path.unlink(missing_ok=True)
        for folder in sorted(folders - {self.folder}, reverse=True):
            # It stays if somebody else has put something into it.
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _write_manifest(self, job: Mapping[str, Any], *, complete: bool = False, **totals: int) -> None:
        content = {"form": _FORM, "complete": complete, **totals, "job": job}
        write_file(self.folder / MANIFEST, [f"{json.dumps(content, indent=2)}\n".encode()])


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of an output folder; None: it has none.

    Raises:
        FileError: it is not a manifest that this release can read.
    """
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read {path}: {error}") from error
    with _readable(path):
        manifest: dict[str, Any] = json.loads(text)
        if manifest["form"] != _FORM:
            raise FileError(
                f"{path} has form {manifest['form']!r}, and this release reads form {_FORM}: update vqserve"
            )
        if not checked(manifest["job"])["format"]["name"]:
            raise ValueError("it names no format")
    return manifest


def read_parts(folder: Path) -> Iterator[tuple[Part, Iterator[dict[str, Any]]]]:
    """Yield each part of an output, and its records.

    Raises:
        FileError: a record file cannot be read.
    """
    number = 0
    while (path := folder / _FOLDER / _part_name(number)).exists():
        with _readable(path), path.open(encoding="utf-8") as lines:
            part = Part.of_line(next(lines))
        yield part, read_records(folder, number)
        number += 1


def read_records(folder: Path, number: int) -> Iterator[dict[str, Any]]:
    """Yield the records of one part.

    Raises:
        FileError: its record file cannot be read.
    """
    path = folder / _FOLDER / _part_name(number)
    with _readable(path), path.open(encoding="utf-8") as lines:
        next(lines)
        yield from map(json.loads, lines)


def has_results(folder: Path) -> bool:
    """Return whether a job has written a result into a folder.

    Raises:
        FileError: a record file cannot be read.
    """
    return any(part.items for part, _ in read_parts(folder))


def begun_parts(folder: Path, job: Mapping[str, Any], sources: Sequence[SourceFile]) -> list[Part]:
    """Return the whole parts of an output, after a check that they are of this job; without an output there are none.

    Raises:
        FileError: the folder has the output of another job.
    """
    before = read_manifest(folder)
    if before is None or not has_results(folder):
        return []
    differences = job_differences(before["job"], json.loads(json.dumps(job)))
    if not differences:
        listed = "".join(map(_source_line, sources))
        path = folder / _FOLDER / _SOURCES
        with _readable(path):
            differences = source_differences(path.read_text(encoding="utf-8"), listed)
    if differences:
        raise FileError(
            f"{folder} has the output of another job: {some_of(differences)}. Name another folder, or begin anew "
            "with --force, which removes that output"
        )
    return [part for part, _ in read_parts(folder)]


def check_file(folder: Path, file: Written) -> None:
    """Check that a file of an output is as it was written.

    Raises:
        FileError: it is missing or was changed.
    """
    path = file_below(folder, file.name)
    try:
        is_same = path.stat().st_size == file.nbytes
        if is_same:
            with path.open("rb", buffering=0) as data:
                is_same = hashlib.file_digest(data, "sha256").hexdigest() == file.sha256
    except FileNotFoundError:
        raise FileError(f"{path} is missing, which was written before") from None
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    if not is_same:
        raise FileError(f"{path} is not as it was written: it was changed or damaged since")


def file_below(folder: Path, name: str) -> Path:
    """Return the path of a file that the records of an output name.

    Raises:
        FileError: it is not in the output: the records may be those of a stranger.
    """
    path = folder / name
    if problem_of(name) is not None or not path.parent.resolve().is_relative_to(folder.resolve()):
        raise FileError(f"{folder} has records that name the file {quoted(name)}, which is not below it")
    return path


def _source_line(source: SourceFile) -> str:
    return line_of({"name": source.name, "key": source.key, "bytes": source.size, "version": source.version})


def line_of(fields: Mapping[str, Any]) -> str:
    """Return a line of JSON."""
    return _encode(fields) + "\n"


def _part_name(number: int) -> str:
    return f"part-{number:05}.jsonl"


def _part_number(path: Path) -> int:
    digits = path.stem.removeprefix("part-")
    return int(digits) if digits.isdecimal() else 0


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, StopIteration, AttributeError, RecursionError) as error:
        raise FileError(f"{path} is damaged, or not a file that vqserve wrote: {error!r}") from error


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error
