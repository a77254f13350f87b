"""The searcher that calls the compiled library."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from vqserve.errors import InvalidArgument
from vqserve_server.search.native.codebook import NativeCodebook
from vqserve_server.search.native.library import levels, load
from vqserve_server.search.searcher import Objective, OnDemand, SearchCounts, Searcher

_TwoCounts = ctypes.c_int64 * 2


def num_threads() -> int:
    """Return how many threads may share a search."""
    return torch.get_num_threads()


class NativeSearcher(Searcher):
    """Searches in float32 with error bounds, then in float64 and in twice float64, all in compiled code.

    Attributes:
        book: the codebook as the library reads it.
        library: the library.
    """

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
        """Prepare a codebook that `fits`.

        Args:
            codes: (K, D) float32 on the CPU.
            bias: (K,) float32, for DOT.
            objective: quantity by which the winning code is chosen.
            fallback: factory of the searcher for rows that this one cannot decide: very large rows, and rows that are
                near too many codes.
            level: instruction set, one of `levels()`; None: the best.
        """
        self.library = load(level or levels()[0])
        self.book = NativeCodebook(codes, bias, objective, self.library)
        self._fallback = OnDemand(fallback, codes.device)
        self._dim = codes.shape[1]

    def search(self, rows: Tensor, counts: SearchCounts | None = None) -> Tensor:
        """Return the winning code of every row; see `Searcher.search`."""
        is_fit = rows.dim() == 2 and rows.shape[1] == self._dim and rows.dtype in (torch.float32, torch.float64)
        if not is_fit or rows.device.type != "cpu":
            raise InvalidArgument(
                f"rows must be (n, {self._dim}) float32 or float64 on the CPU, not {tuple(rows.shape)} {rows.dtype} "
                f"on {rows.device}"
            )
        # Compiled code reads memory, so a negation that torch has postponed must be carried out first.
        rows = rows.detach().resolve_neg().contiguous()
        winners = torch.empty(rows.shape[0], dtype=torch.int64, device="cpu")
        two_counts = _TwoCounts()
        undecided: int = self.library.search(
            ctypes.addressof(self.book.struct),
            rows.data_ptr(),
            rows.dtype == torch.float64,
            rows.shape[0],
            num_threads(),
            winners.data_ptr(),
            ctypes.addressof(two_counts),
        )
        if undecided < 0:
            raise MemoryError("no memory for a search")
        if undecided:
            is_open = winners < 0
            winners[is_open] = self._fallback().search(rows[is_open])
        if counts is not None:
            rechecked, expanded = two_counts
            counts.add(rows=len(rows), rechecked=rechecked + undecided, arbitrated=expanded + undecided)
        return winners
