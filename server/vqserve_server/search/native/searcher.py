"""The searcher that calls the compiled library, on numpy arrays."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vqserve.errors import InvalidArgument
from vqserve_server.device import CPU
from vqserve_server.search.native.codebook import NativeCodebook
from vqserve_server.search.native.library import levels, load
from vqserve_server.search.searcher import Objective, OnDemand, RowSearcher, SearchCounts
from vqserve_server.search.threads import search_threads

if TYPE_CHECKING:
    from vqserve_server.search.searcher import Searcher

Rows = npt.NDArray[Any]
_TwoCounts = ctypes.c_int64 * 2


class NativeSearcher(RowSearcher[Rows]):
    """Searches in float32 with error bounds, then in float64 and in twice float64, all in compiled code.

    Attributes:
        book: the codebook as the library reads it.
        library: the library.
    """

    backend = "native"

    def __init__(
        self,
        codes: npt.NDArray[np.float32],
        bias: npt.NDArray[np.float32] | None,
        objective: Objective,
        *,
        fallback: Callable[[], Searcher],
        level: str | None = None,
    ) -> None:
        """Prepare a codebook that `fits`.

        Args:
            codes: (K, D) float32.
            bias: (K,) float32, for DOT.
            objective: quantity by which the winning code is chosen.
            fallback: factory of the searcher for rows that this one cannot decide: very large rows, and rows that are
                near too many codes. torch is imported for them.
            level: instruction set, one of `levels()`; None: the best.
        """
        self.library = load(level or levels()[0])
        self.book = NativeCodebook(codes, bias, objective, self.library)
        self._fallback = OnDemand(fallback, CPU)
        self._dim = codes.shape[1]
        # A row of zeros, such as padding is, scores the bias of each code: it is as near to all codes without one.
        self._of_zeros = None if objective is Objective.L2 else 0 if bias is None else int(np.argmax(bias))

    def search(self, rows: Rows, counts: SearchCounts | None = None) -> npt.NDArray[np.int64]:
        """Return the winning code of every row; see `RowSearcher.search`."""
        if rows.ndim != 2 or rows.shape[1] != self._dim or rows.dtype not in (np.float32, np.float64):
            raise InvalidArgument(
                f"rows must be (n, {self._dim}) float32 or float64 on the CPU, not {rows.shape} {rows.dtype}"
            )
        rows = np.ascontiguousarray(rows)
        winners = np.empty(len(rows), np.int64)
        two_counts = _TwoCounts()
        undecided: int = self.library.search(
            ctypes.addressof(self.book.struct),
            rows.ctypes.data,
            rows.dtype == np.float64,
            len(rows),
            search_threads(),
            winners.ctypes.data,
            ctypes.addressof(two_counts),
        )
        if undecided < 0:
            raise MemoryError("no memory for a search")
        if undecided:
            is_open = winners < 0
            winners[is_open] = self._search_open(rows[is_open])
        if counts is not None:
            rechecked, expanded = two_counts
            counts.add(rows=len(rows), rechecked=rechecked + undecided, arbitrated=expanded + undecided)
        return winners

    def _search_open(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Return the winners of rows that the compiled search left undecided."""
        if self._of_zeros is None:
            return self._search_otherwise(rows)
        winners = np.full(len(rows), self._of_zeros)
        is_open = rows.any(axis=1)
        if is_open.any():
            winners[is_open] = self._search_otherwise(rows[is_open])
        return winners

    def _search_otherwise(self, rows: Rows) -> npt.NDArray[np.int64]:
        import torch  # noqa: PLC0415

        winners: npt.NDArray[np.int64] = self._fallback().search(torch.from_numpy(rows)).numpy()
        return winners
