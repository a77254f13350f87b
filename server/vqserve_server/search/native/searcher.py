"""The searcher over scan.c: cuts rows among threads and settles what is left open."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqserve_server.errors import InvalidRequest
from vqserve_server.search.native.codebook import NativeCodebook
from vqserve_server.search.native.library import OpenStruct, RowsStruct, levels, load
from vqserve_server.search.searcher import Objective, SearchCounts, Searcher
from vqserve_server.search.settle import Arbiter

# Below this many multiplications a second thread costs more than it saves.
_WORK_PER_THREAD = 1 << 21
# Rows of one call to scan.c: what it needs beside them stays small.
_CHUNK_ROWS = 1 << 14
_PAIRS_PER_ROW = 4


class NativeSearcher(Searcher):
    """float32 with error bounds, then float64 and twice float64, all in compiled code."""

    backend = "native"

    def __init__(
        self,
        codes: Tensor,
        bias: Tensor | None,
        objective: Objective,
        *,
        fallback: Callable[[], Searcher],
        level: str | None = None,
    ) -> None:
        """Take a codebook that `fits`.

        Args:
            codes: (K, D) float32 on the CPU.
            bias: (K,) float32, for DOT.
            objective: what the winning code is best at.
            fallback: makes the searcher for rows that float32 cannot take: far too large, or near to too many codes.
            level: instruction set, one of `levels()`; None: the best.
        """
        self._library = load(level or levels()[0])
        self._book = NativeCodebook(codes, bias, objective, self._library)
        self._arbiter = Arbiter(codes, bias, objective)
        self._fallback = functools.cache(fallback)
        self._dim = codes.shape[1]
        self._work_per_row = codes.shape[0] * codes.shape[1]

    def search(self, rows: Tensor, counts: SearchCounts | None = None) -> Tensor:
        """Return the winning code of every row; see `Searcher.search`."""
        if rows.dim() != 2 or rows.shape[1] != self._dim or rows.dtype not in (torch.float32, torch.float64):
            raise InvalidRequest(
                f"rows must be (n, {self._dim}) float32 or float64, not {tuple(rows.shape)} {rows.dtype}"
            )
        array = np.ascontiguousarray(rows.detach().numpy())
        winners = np.empty(len(array), np.int64)
        threads = min(torch.get_num_threads(), len(array) * self._work_per_row // _WORK_PER_THREAD)
        share = min(_CHUNK_ROWS, -(-len(array) // max(1, threads)))
        chunks = [slice(start, start + share) for start in range(0, len(array), max(1, share))]
        mapped = _pool().map if threads > 1 else map
        for left_open in mapped(lambda chunk: self._search_chunk(array[chunk], winners[chunk]), chunks):
            if counts is not None:
                counts.add(rechecked=left_open.rechecked, arbitrated=left_open.expanded)
        if counts is not None:
            counts.add(rows=len(array))
        return torch.from_numpy(winners)

    def _search_chunk(self, rows: npt.NDArray[np.floating], winners: npt.NDArray[np.int64]) -> OpenStruct:
        count = len(rows)
        order, home = np.empty(count, np.int64), np.empty(count, np.int32)
        pair_row, pair_code = np.empty((2, count * _PAIRS_PER_ROW + 64), np.int64)
        rescan_row = np.empty(count, np.int64)
        is_narrow = rows.dtype == np.float32
        left_open = OpenStruct(
            capacity=pair_row.size,
            pair_row=pair_row.ctypes.data,
            pair_code=pair_code.ctypes.data,
            rescan_row=rescan_row.ctypes.data,
        )
        self._library.scan(
            self._book.struct,
            RowsStruct(
                count=count,
                narrow=rows.ctypes.data if is_narrow else None,
                wide=None if is_narrow else rows.ctypes.data,
                order=order.ctypes.data,
                home=home.ctypes.data,
                winner=winners.ctypes.data,
            ),
            left_open,
        )
        if left_open.pairs:
            self._settle(rows, winners, pair_row[: left_open.pairs], pair_code[: left_open.pairs])
        if left_open.rescans:
            again = rescan_row[: left_open.rescans]
            winners[again] = self._fallback().search(torch.from_numpy(rows[again])).numpy()
        return left_open

    def _settle(
        self,
        rows: npt.NDArray[np.floating],
        winners: npt.NDArray[np.int64],
        pair_row: npt.NDArray[np.int64],
        pair_code: npt.NDArray[np.int64],
    ) -> None:
        # scan.c visits rows in its own order; each row's pairs are together.
        open_rows, position = np.unique(pair_row, return_inverse=True)
        by_row = np.argsort(position, kind="stable")
        winners[open_rows] = self._arbiter.settle(rows[open_rows], position[by_row], pair_code[by_row])


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="vqserve-search")


# A forked child has no threads: its pool is made anew.
os.register_at_fork(after_in_child=_pool.cache_clear)
