"""What a server asks of a codebook: rows of numpy to indices and back. torch is not imported here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vqserve.errors import CodebookError
from vqserve.types import OutputName
from vqserve_server.device import Device
from vqserve_server.search.native import NativeBatch
from vqserve_server.search.searcher import Objective, SearchCounts

# How many codes a self-test searches for.
_MAX_PROBES = 256
# Far more than the roundings of a sum of any length that fits a codebook.
_FLOAT64_ROOM = 2.0**-30


@dataclass(frozen=True, kw_only=True, eq=False)
class Sizes:
    """Sizes of a codebook that serves.

    Attributes:
        num_codes: K.
        vocab_size: encode reports indices in [0, vocab_size) (an integer sentinel below zero aside).
        decodable: decode takes indices in [0, decodable).
        input_dim: C, the width of the rows that encode takes.
        code_dim: D, the width of a code row.
        output_dim: the width of a decoded row.
        num_quantizers: indices per token.
        stage_vocab_sizes: the exclusive bound of each stage's indices where these differ; empty: `vocab_size` bounds
            all indices.
    """

    num_codes: int
    vocab_size: int
    decodable: int
    input_dim: int
    code_dim: int
    output_dim: int
    num_quantizers: int = 1
    stage_vocab_sizes: tuple[int, ...] = ()


class Served(ABC):
    """A codebook that serves rows of numpy. It is thread-safe and can be pickled."""

    @property
    @abstractmethod
    def sizes(self) -> Sizes:
        """Its sizes."""

    @property
    @abstractmethod
    def device(self) -> Device:
        """Where it is."""

    @property
    @abstractmethod
    def dtype(self) -> np.dtype[Any]:
        """The type of the codebook's elements, and of decoded rows."""

    @property
    @abstractmethod
    def search_backend(self) -> str:
        """The name of the search backend; "none" where nothing is searched."""

    @property
    def native_batch(self) -> NativeBatch | None:
        """What reads and writes the arrays of requests itself; None: this codebook takes and gives rows only."""
        return None

    @abstractmethod
    def encode_rows(
        self, rows: npt.NDArray[np.floating[Any]], *, num_quantizers: int | None = None
    ) -> npt.NDArray[np.int64]:
        """Return the indices of rows that were checked before; see `Tokenizer.encode_rows`."""

    @abstractmethod
    def decode_rows(
        self, indices: npt.NDArray[np.int64], *, output: OutputName = "latents", dtype: npt.DTypeLike | None = None
    ) -> npt.NDArray[Any]:
        """Return the rows of indices that were checked before; see `Tokenizer.decode_rows`."""

    @abstractmethod
    def counting(self, counts: SearchCounts) -> Served:
        """Return a copy whose searches add to counters: a residual codebook adds for each of its stages."""

    @abstractmethod
    def check_itself(self) -> None:
        """Self-test: encode a sample of the codes; each must get its own index, or that of an equally good code.

        Raises:
            CodebookError: one did not: this codebook would give wrong tokens on this machine.
        """


def probe_ids(count: int) -> npt.NDArray[np.int64]:
    """Return the ids that a self-test of `count` codes uses: the first, the last, and evenly spaced ones."""
    return np.linspace(0, count - 1, min(count, _MAX_PROBES)).round().astype(np.int64)


def misplaced(code: int, backend: str) -> CodebookError:
    """Return the error of a code for whose row a search backend finds a worse one."""
    return CodebookError(f"code {code} is not found at its own place by search {backend!r}")


def is_no_worse(found: Any, asked: Any, objective: Objective, biases: tuple[Any, Any] | None = None) -> Any:
    """Return whether codes answer the rows of other codes as well as these do: bool (n,).

    Of L2 only an equal code does. Scores are compared in float64, within its rounding.

    Args:
        found: (n, D) float64 codes, numpy's or torch's.
        asked: (n, D) likewise; the rows.
        objective: what decides.
        biases: (n,) float64 of both.
    """
    if objective is Objective.L2:
        return (asked == found).all(1)
    better, size = (asked * found - asked * asked).sum(1), (abs(asked * found) + asked * asked).sum(1)
    if biases is not None:
        of_found, of_asked = biases
        better, size = better + of_found - of_asked, size + abs(of_found) + abs(of_asked)
    return better >= -_FLOAT64_ROOM * size
