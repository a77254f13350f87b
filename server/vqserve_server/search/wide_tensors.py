"""Sums over the rows of large tensors, in float64, of which only a part is in memory at once; see `wide_arrays`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vqserve_server.search import denormals
from vqserve_server.search.denormals import copy_as_float64
from vqserve_server.search.wide_arrays import CHUNK_BYTES


def norms(vectors: Tensor) -> Tensor:
    """Return the Euclidean norms (n,) float64 of (n, D) vectors, not scaled, so that squares may underflow."""
    lengths = torch.empty(vectors.shape[0], dtype=torch.float64, device=vectors.device)
    for part, wide in _wide_chunks(vectors):
        torch.linalg.vector_norm(wide, dim=1, out=lengths[part])
    return lengths


def sums_of_squares(vectors: Tensor) -> Tensor:
    """Return the sums (n,) float64 of the squares of (n, D) vectors."""
    sums = torch.empty(vectors.shape[0], dtype=torch.float64, device=vectors.device)
    for part, wide in _wide_chunks(vectors):
        torch.sum(wide.square_(), dim=1, out=sums[part])
    return sums


def to_float64(numbers: Tensor) -> Tensor:
    """Return float32 or float64 numbers as float64, exactly."""
    return denormals.to_float64(numbers.detach())


def zeros_for(vectors: Tensor) -> Tensor:
    """Return a zero for each vector."""
    return torch.zeros(vectors.shape[0], dtype=torch.float64, device=vectors.device)


def cast(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float64 numbers in another type, rounded to nearest."""
    return numbers.to(dtype)


def _wide_chunks(vectors: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield parts of vectors in float64, all in one buffer, which the caller may change.

    With a buffer for each part, the memory of a large codebook grew by twice its size: torch's aligned allocations do
    not fit the holes that earlier ones of the same size leave.
    """
    count, dim = vectors.shape
    step = max(1, CHUNK_BYTES // (8 * dim))
    buffer = torch.empty(min(step, count), dim, dtype=torch.float64, device=vectors.device)
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        yield part, copy_as_float64(buffer[: part.stop - start], vectors[part].detach())
