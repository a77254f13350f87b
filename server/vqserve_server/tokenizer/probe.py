"""Some rows and their indices: what a device must find again as long as it is sound."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vqserve.errors import InvalidArgument

if TYPE_CHECKING:
    from vqserve_server.tokenizer.tokenizer import Tokenizer

_ROWS = 16
# The first run may compile a kernel, and another process may disturb one.
_RUNS = 3
_SCALES = np.array([[1.0], [10.0], [100.0], [1000.0]], np.float32)
# Rows of larger numbers might overflow in a projection.
_LARGEST = 1e6


@dataclass(frozen=True)
class Probe:
    """Rows whose indices are known.

    Attributes:
        rows: (16, input_dim) float32.
        indices: their indices as `Tokenizer.encode_rows` gives them.
        seconds: how long they took to find.
    """

    rows: npt.NDArray[np.float32]
    indices: npt.NDArray[Any]
    seconds: float

    @property
    def row_seconds(self) -> float:
        """Seconds that a row takes at most: in a larger batch it takes less."""
        return self.seconds / len(self.rows)


def probe(tokenizer: Tokenizer) -> Probe | None:
    """Return a probe of a codebook, computed on its device; None if its projection takes not even small numbers."""
    rows = _rows(tokenizer)
    seconds = []
    try:
        for _ in range(_RUNS):
            started = time.perf_counter()
            indices = tokenizer.encode_rows(rows)
            seconds.append(time.perf_counter() - started)
    except InvalidArgument:
        return None
    return Probe(rows, indices, min(seconds))


def _rows(tokenizer: Tokenizer) -> npt.NDArray[np.float32]:
    """Return rows that have different indices: near codes that are far apart, and of several lengths."""
    info = tokenizer.info
    rows = np.random.default_rng(0).uniform(-1, 1, (_ROWS, info.input_dim)).astype(np.float32)
    rows *= np.resize(_SCALES, (_ROWS, 1))
    if info.output_dim == info.input_dim:
        sizes = info.stage_vocab_sizes or (tokenizer.decodable,) * info.num_quantizers
        indices = np.stack([np.linspace(0, size - 1, _ROWS // 2).astype(np.int64) for size in sizes], axis=1)
        decoded = tokenizer.decode_rows(indices if info.has_stages else indices[:, 0])
        if np.abs(decoded).max() < _LARGEST:
            rows[: len(decoded)] = decoded
    return rows
