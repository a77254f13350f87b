"""What shards have in common: the formats of one file a shard, and how arrays become bytes."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np

from vqserve_data.drafts import Draft, publish, writing
from vqserve_data.errors import FileError
from vqserve_data.items import Array
from vqserve_data.keys import problem_of, quoted
from vqserve_data.writers.protocol import Written


class OneFileWriter:
    """What writers of one file a shard have in common."""

    name: str
    kinds = frozenset({"indices", "latents"})
    keeps_fields = False

    def names(self, number: int) -> str:
        """Return the name of the file of a shard."""
        return f"shard-{number:05}.{self.name}"

    def file_of(self, key: str) -> str:
        """Never called: `names` names the files."""
        raise NotImplementedError


class OneFile:
    """A shard that is one file, which grows with each item.

    A subclass writes into `_file`: each item in `_write`, and what comes after the last one in `_finish`.
    """

    def __init__(self, path: Path) -> None:
        self._draft = Draft.of(path)
        self._file: IO[bytes] = self._draft.open()
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that were added."""
        return self._nbytes

    def place(self, key: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return an array in memory to fill for the next item.

        Raises:
            FileError: the format cannot hold it.
        """
        check_key(key)
        self._check(key, shape, dtype)
        return np.empty(shape, dtype.newbyteorder("<"))

    def add(self, key: str, array: Array, fields: Mapping[str, Any]) -> None:
        """Add the next item.

        Raises:
            FileError: it cannot be written; nothing of the shard is left.
        """
        try:
            with writing(self._draft.path):
                self._write(key, array, fields)
        except BaseException:
            # A part of it may be there.
            self.abandon()
            raise
        self._nbytes += array.nbytes

    def close(self) -> list[Written]:
        """Write all to the disk, and rename the file to its name.

        Raises:
            FileError: it cannot be written; nothing of it is left.
        """
        try:
            with writing(self._draft.path):
                self._finish()
                size = self._file.seek(0, io.SEEK_END)
                self._file.close()
            sha256 = self._draft.sha256()
            publish([self._draft])
        except BaseException:
            self.abandon()
            raise
        return [Written(self._draft.path.name, size, sha256)]

    def abandon(self) -> None:
        """Remove what was written; after `close` nothing happens."""
        close_quietly(self._file)
        self._draft.remove()

    def _check(self, key: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Raise a FileError if the format cannot hold an item."""

    def _write(self, key: str, array: Array, fields: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def _finish(self) -> None:
        """Write what comes after the last item."""


def check_key(key: str) -> None:
    """Check that a key can be the name of a file or of a member.

    Raises:
        FileError: it cannot.
    """
    if problem := problem_of(key):
        raise FileError(f"the key {quoted(key)} {problem}")


def close_quietly(file: IO[bytes]) -> None:
    """Close a file that nobody wants: on a full disk, what is still in its buffer cannot be written."""
    raw = getattr(file, "raw", None)
    try:
        file.close()
    except OSError:
        if raw is not None:
            raw.close()


def bytes_of(array: Array) -> memoryview:
    """Return the elements of an array in C order."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def npy_header(array: Array) -> bytes:
    """Return what comes before the elements in a .npy file with the array in C order."""
    return _npy_header(array.shape, array.dtype)


# Most items have one of few shapes, and making a header takes as long as writing a small item.
@functools.lru_cache(1 << 10)
def _npy_header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    header = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()


def kind_of(dtype: np.dtype[Any]) -> str:
    """Return which arrays have this type: "latents" are floating point numbers, "indices" integers."""
    return "latents" if dtype.kind == "f" else "indices"


def cannot_hold(format_name: str, key: str, why: str) -> NoReturn:
    """Raise the error about an item that a format cannot hold.

    Raises:
        FileError: always.
    """
    raise FileError(f"--format {format_name} cannot hold {key}: {why}")
