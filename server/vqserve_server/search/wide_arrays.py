"""Sums over the rows of large numpy arrays, in float64, of which only a part is in memory at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from vqserve_server.search.denormals import denormals_enabled

Floats = npt.NDArray[np.floating[Any]]
Float64s = npt.NDArray[np.float64]

# Bytes of one part in float64.
CHUNK_BYTES = 1 << 22


def norms(vectors: Floats) -> Float64s:
    """Return the Euclidean norms (n,) float64 of (n, D) vectors, not scaled, so that squares may underflow."""
    lengths: Float64s = np.sqrt(sums_of_squares(vectors))
    return lengths


@denormals_enabled()
def sums_of_squares(vectors: Floats) -> Float64s:
    """Return the sums (n,) float64 of the squares of (n, D) vectors."""
    sums = np.empty(len(vectors))
    # An infinite sum is what it should be.
    with np.errstate(over="ignore", under="ignore"):
        for part, wide in _wide_chunks(vectors):
            np.square(wide, out=wide).sum(axis=1, out=sums[part])
    return sums


@denormals_enabled()
def to_float64(numbers: Floats) -> Float64s:
    """Return float32 or float64 numbers as float64, exactly."""
    return numbers.astype(np.float64, copy=False)


def zeros_for(vectors: Floats) -> Float64s:
    """Return a zero for each vector."""
    return np.zeros(len(vectors))


def cast(numbers: Float64s, dtype: npt.DTypeLike) -> Floats:
    """Return float64 numbers in another type, rounded to nearest."""
    with np.errstate(over="ignore", under="ignore"):
        return numbers.astype(dtype, copy=False)


def _wide_chunks(vectors: Floats) -> Iterator[tuple[slice, Float64s]]:
    """Yield parts of vectors in float64, all in one buffer, which the caller may change."""
    count, dim = vectors.shape
    step = max(1, CHUNK_BYTES // (8 * dim))
    buffer = np.empty((min(step, count), dim))
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        wide = buffer[: part.stop - start]
        np.copyto(wide, vectors[part])
        yield part, wide
