"""`vqserve encode` and `decode` of one .npy file: to another, piece by piece."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vqserve.codebook_info import CodebookInfo
from vqserve.errors import DigestChanged, DigestMismatch, InvalidArgument, VqserveError, of_file
from vqserve.npy import NpyFile
from vqserve_client.arrays import Array
from vqserve_client.client import Client
from vqserve_client.conversion import Conversion, Outline, Piece
from vqserve_data.files import check_output, new_array, open_array, read_part

# Called with the number of tokens of the file; returns a function to call with the number of tokens that are done.
Progress = Callable[[int], Callable[[int], None]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One file to convert into another.

    Attributes:
        source: the file to read.
        target: the file to write.
        force: whether `target` may be replaced.
        is_pinned: whether the user named the digest: a codebook that is replaced is then another error.
    """

    source: Path
    target: Path
    force: bool = False
    is_pinned: bool = False


@dataclass(frozen=True)
class Done:
    """The file that was written."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    info: CodebookInfo


def convert_file(client: Client, task: Task, conversion: Conversion, progress: Progress) -> Done:
    """Write the indices of a file of latents, or the latents of a file of indices.

    Raises:
        FileError: a file cannot be read or written.
        VqserveError: see errors.py.
    """
    check_output(task.target, force=task.force, source=task.source)
    array = open_array(task.source)
    with of_file(task.source):
        outline = conversion.outline(array.shape, array.dtype)
    with new_array(task.target, outline.shape, conversion.dtype, force=task.force) as out:
        done = progress(outline.tokens)
        pending: deque[Piece] = deque()
        arrays = _arrays(array, conversion, outline, pending)
        with _one_codebook(task, conversion.info), _whole_file(task, conversion, pending):
            for result in conversion.many(client, arrays):
                piece = pending.popleft()
                out[piece.target] = result
                done(outline.tokens_in(result))
    return Done(outline.shape, conversion.dtype, conversion.info)


def _arrays(array: NpyFile, conversion: Conversion, outline: Outline, pending: deque[Piece]) -> Iterator[Array]:
    """Yield the pieces of the source; `pending` gets the place of each result."""
    for piece in conversion.pieces(outline):
        pending.append(piece)
        yield read_part(array, piece.source)


@contextlib.contextmanager
def _whole_file(task: Task, conversion: Conversion, pending: Sequence[Piece]) -> Iterator[None]:
    """In an error about a piece (the first pending one), name the file and count positions in the whole file."""
    try:
        yield
    except InvalidArgument as error:
        whole = conversion.of_whole(error, pending[0]) if pending else error
        raise whole.with_fields(item=None, path=str(task.source)) from None
    except VqserveError as error:
        error.item = None
        raise


@contextlib.contextmanager
def _one_codebook(task: Task, info: CodebookInfo) -> Iterator[None]:
    """Raise DigestChanged for a replaced codebook, unless the user pinned its digest."""
    try:
        yield
    except DigestMismatch as error:
        if task.is_pinned:
            raise
        raise DigestChanged(
            f"the codebook no longer has digest {info.digest}",
            target=error.target,
            codebook=info.name,
            request_id=error.request_id,
        ) from error
