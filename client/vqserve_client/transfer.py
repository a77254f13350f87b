"""`vqserve encode` and `decode`: one file to another, piece by piece, through `encode_many` and `decode_many`."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vqserve import payload
from vqserve.codebook_info import CodebookInfo
from vqserve.dtypes import LatentDTypeName
from vqserve.errors import DigestChanged, DigestMismatch, InvalidArgument, VqserveError, of_file
from vqserve.layout import indices_shape, latents_shape, parse_layout
from vqserve.npy import NpyFile
from vqserve.types import LayoutName, OutputName
from vqserve.validation import check_num_quantizers
from vqserve_client.arrays import (
    Array,
    Cut,
    empty_latents,
    indices_cut,
    indices_geometry,
    indices_input,
    latents_cut,
    latents_geometry,
    latents_input,
    of_whole,
    plan,
)
from vqserve_client.catalogue import choose
from vqserve_client.client import Client
from vqserve_data.files import check_output, new_array, open_array, read_part

# Small enough that several pieces in flight need little memory, large enough that calls cost little.
_PIECE_BYTES = 4 << 20

# Called with the number of tokens of the file; returns a function to call with the number of tokens that are done.
Progress = Callable[[int], Callable[[int], None]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One file to convert into another."""

    source: Path
    target: Path
    force: bool = False
    codebook: str | None = None
    digest: str | None = None
    layout: LayoutName | None = None
    dtype: LatentDTypeName = "float32"
    output: OutputName = "latents"
    num_quantizers: int | None = None


@dataclass(frozen=True)
class Done:
    """The file that was written."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    info: CodebookInfo


@dataclass(frozen=True)
class _Piece:
    """One array of `encode_many`, as cuts of the grid of tokens, of the source and of the target."""

    grid: Cut
    source: Cut
    target: Cut


def encode_file(client: Client, task: Task, progress: Progress) -> Done:
    """Write the indices of a file of latents.

    Raises:
        FileError: a file cannot be read or written.
        VqserveError: see errors.py.
    """
    check_output(task.target, force=task.force, source=task.source)
    array = open_array(task.source)
    info = _info(client, task)
    stages = _stages(task, info)
    with of_file(task.source):
        item_bytes = payload.itemsize(latents_input(np.empty(0, array.dtype)).dtype)
        grid, layout = latents_geometry(array.shape, parse_layout(task.layout), info)
    dtype = np.dtype(payload.dtype_name(payload.index_dtype(info.vocab_size)))
    cuts = plan(grid, max(1, _PIECE_BYTES // (info.input_dim * item_bytes)))
    shape = indices_shape(grid, stages, layout)
    with new_array(task.target, shape, dtype, force=task.force) as out:
        done = progress(math.prod(grid))
        pending: deque[_Piece] = deque()
        pieces = (_Piece(cut, latents_cut(cut, layout), indices_cut(cut, stages, layout)) for cut in cuts)
        options: dict[str, Any] = {"codebook": info.name, "digest": info.digest, "num_quantizers": stages}
        with _one_codebook(task, info), _whole_file(task, pending):
            for indices in client.encode_many(_arrays(array, pieces, pending), layout=layout, **options):
                out[pending.popleft().target] = indices
                done(indices.size // (stages or 1))
    return Done(shape, dtype, info)


def decode_file(client: Client, task: Task, progress: Progress) -> Done:
    """Write the latents of a file of indices.

    Raises:
        FileError: a file cannot be read or written.
        VqserveError: see errors.py.
    """
    check_output(task.target, force=task.force, source=task.source)
    array = open_array(task.source)
    info = _info(client, task)
    stages = _stages(task, info)
    with of_file(task.source):
        indices_input(np.empty(0, array.dtype))
        grid, layout = indices_geometry(array.shape, parse_layout(task.layout), info, stages=stages)
    width = info.code_dim if task.output == "code_rows" else info.output_dim
    wire = payload.dtype_of_name(task.dtype)
    dtype = empty_latents((0,), wire, None).dtype
    cuts = plan(grid, max(1, _PIECE_BYTES // (width * dtype.itemsize)))
    shape = latents_shape(grid, width, layout)
    with new_array(task.target, shape, dtype, force=task.force) as out:
        done = progress(math.prod(grid))
        pending: deque[_Piece] = deque()
        pieces = (_Piece(cut, indices_cut(cut, stages, layout), latents_cut(cut, layout)) for cut in cuts)
        options: dict[str, Any] = {"codebook": info.name, "digest": info.digest, "num_quantizers": stages}
        options |= {"dtype": task.dtype, "output": task.output}
        with _one_codebook(task, info), _whole_file(task, pending):
            for latents in client.decode_many(_arrays(array, pieces, pending), layout=layout, **options):
                out[pending.popleft().target] = latents
                done(latents.size // width)
    return Done(shape, dtype, info)


def _arrays(array: NpyFile, pieces: Iterator[_Piece], pending: deque[_Piece]) -> Iterator[Array]:
    """Yield the pieces of the source; `pending` gets the place of each result."""
    for piece in pieces:
        pending.append(piece)
        yield read_part(array, piece.source)


@contextlib.contextmanager
def _whole_file(task: Task, pending: Sequence[_Piece]) -> Iterator[None]:
    """In an error about a piece (the first pending one), name the file and count positions in the whole file."""
    try:
        yield
    except InvalidArgument as error:
        whole = of_whole(error, array=pending[0].source, grid=pending[0].grid) if pending else error
        raise whole.with_fields(item=None, path=str(task.source)) from None
    except VqserveError as error:
        error.item = None
        raise


def _stages(task: Task, info: CodebookInfo) -> int | None:
    count = check_num_quantizers(task.num_quantizers, available=info.num_quantizers)
    return count if info.has_stages else None


def _info(client: Client, task: Task) -> CodebookInfo:
    """Return the codebook; its digest is pinned for every piece, so that a file never mixes two."""
    return choose(client.codebooks(), task.codebook, task.digest, target=client.target)


@contextlib.contextmanager
def _one_codebook(task: Task, info: CodebookInfo) -> Iterator[None]:
    """Raise DigestChanged for a replaced codebook, unless the user pinned its digest."""
    try:
        yield
    except DigestMismatch as error:
        if task.digest is not None:
            raise
        raise DigestChanged(
            f"the codebook no longer has digest {info.digest}",
            target=error.target,
            codebook=info.name,
            request_id=error.request_id,
        ) from error
