"""Some rows and their indices: what a device must find again as long as it is sound."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from vqserve_server.tokenizer.tokenizer import Tokenizer

_ROWS = 16
# The first run may compile a kernel, and another process may disturb one.
_RUNS = 3


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


def probe(tokenizer: Tokenizer) -> Probe:
    """Return a probe of a codebook, computed on its device."""
    rows = _rows(tokenizer)
    seconds = []
    for _ in range(_RUNS):
        started = time.perf_counter()
        indices = tokenizer.encode_rows(rows)
        seconds.append(time.perf_counter() - started)
    return Probe(rows, indices, min(seconds))


def _rows(tokenizer: Tokenizer) -> npt.NDArray[np.float32]:
    info = tokenizer.info
    # What decodes from indices far apart is near codes far apart. Rows of one norm may all be nearest to one code.
    if info.output_dim == info.input_dim:
        sizes = info.stage_vocab_sizes or (tokenizer.decodable,) * info.num_quantizers
        indices = np.stack([np.linspace(0, size - 1, _ROWS).astype(np.int64) for size in sizes], axis=1)
        rows = tokenizer.decode_rows(indices if info.has_stages else indices[:, 0]).astype(np.float32)
        if np.isfinite(rows).all():
            return np.ascontiguousarray(rows)
    return np.random.default_rng(0).uniform(-1, 1, (_ROWS, info.input_dim)).astype(np.float32)
