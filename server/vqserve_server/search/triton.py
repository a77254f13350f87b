"""Search on CUDA in one Triton kernel: scores, bounds, winner and runner-up never leave the registers."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor

from vqserve_server.search.bounds import ScoreBounds, row_norms
from vqserve_server.search.searcher import Objective, OnDemand, SearchCounts, Searcher

_BLOCK_ROWS = 64
_BLOCK_CODES = 64
# Components are multiplied in blocks of at most this many; tl.dot wants at least 16.
_MAX_BLOCK_DIM = 64
# The kernel counts in 32 bits, up to a block beyond the end: larger codebooks do not fit, and more rows are cut.
_MOST_ELEMENTS = 2**31 - 2**10


def is_available(device: torch.device) -> bool:
    """Return whether Triton is installed and runs there: on CUDA, or anywhere with TRITON_INTERPRET=1.

    On CUDA it compiles a launcher at run time, so that a machine without a C compiler has no Triton.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    has_compiler = any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))
    return device.type == "cuda" and has_compiler


def fits(codes: Tensor) -> bool:
    """Return whether the kernel takes a codebook: float32, and not too large."""
    return codes.dtype == torch.float32 and codes.numel() <= _MOST_ELEMENTS


class FusedSearcher(Searcher):
    """float32 with error bounds in one pass; rows within the bound of a second code go to the fallback."""

    backend = "triton"

    def __init__(
        self, codes: Tensor, bias: Tensor | None, objective: Objective, *, fallback: Callable[[], Searcher]
    ) -> None:
        """Take a codebook that `fits`.

        Args:
            codes: (K, D) float32.
            bias: (K,) float32, for DOT.
            objective: what the winning code is best at.
            fallback: makes the searcher for rows that the bound leaves open.
        """
        self._codes = codes.detach().contiguous()
        self._bounds = ScoreBounds.of(codes, bias, objective, torch.float32)
        self._fallback = OnDemand(fallback, codes.device)

    def search(self, rows: Tensor, counts: SearchCounts | None = None) -> Tensor:
        """Return the winning code of every row; see `Searcher.search`."""
        count, dim = rows.shape
        winners = torch.zeros(count, dtype=torch.int64, device=rows.device)
        if count == 0:
            return winners
        is_open = torch.ones(count, dtype=torch.int8, device=rows.device)
        norms = row_norms(rows, torch.float32)
        for start in range(0, count, _MOST_ELEMENTS // dim):
            part = slice(start, start + _MOST_ELEMENTS // dim)
            self._search_part(rows[part], norms[part], winners[part], is_open[part])
        # The bound does not hold where sums may overflow.
        again = torch.nonzero((is_open != 0) | ~(norms <= self._bounds.longest_row))[:, 0]
        of_fallback = SearchCounts()
        if again.numel():
            winners[again] = self._fallback().search(rows[again], of_fallback)
        if counts is not None:
            counts.add(rows=count, rechecked=again.numel(), arbitrated=of_fallback.arbitrated)
        return winners

    def _search_part(self, rows: Tensor, norms: Tensor, winners: Tensor, is_open: Tensor) -> None:
        from vqserve_server.search.triton_kernel import nearest  # noqa: PLC0415

        count, dim = rows.shape
        # Triton launches on the current device, whatever the tensors': nothing else makes that cuda:1.
        with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
            nearest[-(-count // _BLOCK_ROWS),](
                rows.detach().resolve_neg().float().contiguous(),
                norms,
                self._codes,
                self._bounds.offset,
                self._bounds.slope,
                self._bounds.base,
                winners,
                is_open,
                count,
                self._codes.shape[0],
                dim,
                BLOCK_ROWS=_BLOCK_ROWS,
                BLOCK_CODES=_BLOCK_CODES,
                BLOCK_DIM=min(_MAX_BLOCK_DIM, max(16, 1 << (dim - 1).bit_length())),
            )
