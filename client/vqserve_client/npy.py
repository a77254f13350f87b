"""`.npy` files larger than memory, in and out."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vqserve_client.arrays import Array


class FileError(Exception):
    """A file cannot be used; the text names it."""


def open_array(path: Path) -> Array:
    """Return the array in a file, mapped, not read; nothing in it is executed.

    Raises:
        FileError: if it is no such file.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(len(np.lib.format.MAGIC_PREFIX))
        if magic != np.lib.format.MAGIC_PREFIX:
            raise FileError(f"{path} is not a .npy file")
        return _mapped(path)
    except FileNotFoundError as error:
        raise FileError(f"{path}: there is no such file") from error
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise FileError(f"{path} is not a .npy file of numbers: {error}") from error


def _mapped(path: Path) -> Array:
    try:
        mapped: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:
        # There is nothing to map in an array without elements, but it can be read.
        whole: Array = np.load(path, allow_pickle=False)
        if whole.size:
            raise
        return whole
    return mapped


def check_output(path: Path, *, force: bool, source: Path | None = None) -> None:
    """Check that a file may be made.

    Args:
        path: of the file.
        force: whether one that exists may be replaced.
        source: another file, which is read and never replaced.

    Raises:
        FileError: if it exists and `force` is false, or is the source, or its folder does not exist.
    """
    if path.is_dir():
        raise FileError(f"{path} is a folder")
    if path.exists() and not path.is_file():
        # The file would take its place, and root would have no /dev/null any more.
        raise FileError(f"{path} is a device or a pipe: name a file")
    if source is not None and source.exists() and path.exists() and path.samefile(source):
        raise FileError(f"{path} is what is read: name another file to write")
    if not force and path.exists():
        raise FileError(f"{path} exists: --force replaces it")
    if not path.parent.is_dir():
        raise FileError(f"there is no folder {path.parent}")


@contextlib.contextmanager
def new_array(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], *, force: bool) -> Iterator[Array]:
    """Give a mapped array to fill, which becomes the file only when all went well.

    Raises:
        FileError: if it cannot be made.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with _named(path):
            array = _created(draft, shape, dtype)
        yield array
        with _named(path):
            if isinstance(array, np.memmap):
                array.flush()
            # Somebody else may have made it meanwhile.
            check_output(path, force=force)
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error


def _created(draft: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    if 0 in shape:
        # There is nothing to map.
        empty: Array = np.empty(shape, dtype)
        with draft.open("wb") as file:
            np.save(file, empty, allow_pickle=False)
        return empty
    mapped: Array = np.lib.format.open_memmap(draft, mode="w+", dtype=dtype, shape=shape)
    # Now, because a full disk under a mapped file is no error later but the end of the process.
    with draft.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, draft.stat().st_size)
    return mapped
