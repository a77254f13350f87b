"""Reading and writing `.npy` files larger than memory, and whether a file may be written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vqserve.npy import NpyFile, TruncatedFile
from vqserve_data.drafts import Draft, publish, writing
from vqserve_data.errors import FileError
from vqserve_data.items import Array, Cut


def open_array(path: Path) -> NpyFile:
    """Return the array in a file, which is read part by part; no pickle is loaded.

    Raises:
        FileError: it cannot be read as a .npy file.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(len(np.lib.format.MAGIC_PREFIX))
        if magic != np.lib.format.MAGIC_PREFIX:
            raise FileError(f"{path} is not a .npy file")
        return NpyFile(path)
    except FileNotFoundError as error:
        raise FileError(f"{path}: there is no such file") from error
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise FileError(f"{path} is not a .npy file of numbers: {error}") from error


def read_part(file: NpyFile, cut: Cut) -> Array:
    """Return a part of a file's array.

    Raises:
        FileError: it cannot be read; somebody may have truncated the file.
    """
    try:
        return file[cut]
    except TruncatedFile as error:
        raise FileError(str(error)) from error
    except OSError as error:
        raise FileError(f"cannot read {file.path}: {error.strerror or error}") from error


def check_output(path: Path, *, force: bool, source: Path | None = None) -> None:
    """Check that a file may be written.

    Args:
        path: path of the file.
        force: whether an existing file may be replaced.
        source: the input file, which is never replaced.

    Raises:
        FileError: it exists and `force` is false, it is the source, or its folder does not exist.
    """
    if path.is_dir():
        raise FileError(f"{path} is a folder")
    if path.exists() and not path.is_file():
        # The new file would replace it: root would lose /dev/null.
        raise FileError(f"{path} is a device or a pipe: name a file")
    if source is not None and source.exists() and path.exists() and path.samefile(source):
        raise FileError(f"{path} is what is read: name another file to write")
    if not force and path.exists():
        raise FileError(f"{path} exists: --force replaces it")
    if not path.parent.is_dir():
        raise FileError(f"there is no folder {path.parent}")


@contextlib.contextmanager
def new_array(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], *, force: bool) -> Iterator[Array]:
    """Yield a mapped array to fill; it becomes the file only if the block ends without an error.

    Raises:
        FileError: it cannot be written.
    """
    draft = Draft.unshared(path)
    try:
        yield map_draft(draft, shape, dtype)
        # Another process may have made it meanwhile.
        check_output(path, force=force)
        publish([draft])
    finally:
        draft.remove()


def map_draft(draft: Draft, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Create a draft that is a .npy file, and return its array, mapped.

    Raises:
        FileError: it cannot be created, or the disk is full.
    """
    with writing(draft.path):
        if 0 in shape:
            # An array without elements cannot be mapped.
            empty: Array = np.empty(shape, dtype)
            with draft.file.open("wb") as file:
                np.save(file, empty, allow_pickle=False)
            return empty
        mapped: Array = np.lib.format.open_memmap(draft.file, mode="w+", dtype=dtype, shape=shape)
        # Allocated now: a full disk under a mapped file would later kill the process without an error.
        with draft.file.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, draft.file.stat().st_size)
        return mapped
