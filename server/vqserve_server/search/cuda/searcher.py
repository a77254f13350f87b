"""Search on CUDA by a kernel of our own, which keeps scores, bounds, winner and runner-up in registers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vqserve_server.search.bounds import ScoreBounds, row_norms
from vqserve_server.search.cuda.launcher import Launcher
from vqserve_server.search.cuda.variants import ARCHITECTURES, architecture_of, nearest
from vqserve_server.search.searcher import Objective, OnDemand, SearchCounts, Searcher

# The kernel indexes in 32 bits, up to one block beyond the end: larger codebooks do not fit, and more rows are split.
_MOST_ELEMENTS = 2**31 - 2**10


def fits(codes: Tensor) -> bool:
    """Return whether the kernel supports a codebook: float32, and not too large."""
    return codes.dtype == torch.float32 and codes.numel() <= _MOST_ELEMENTS


class CudaSearcher(Searcher):
    """Searches in float32 with error bounds in one pass; undecided rows go to the fallback."""

    backend = "triton"

    def __init__(
        self,
        codes: Tensor,
        bias: Tensor | None,
        objective: Objective,
        *,
        fallback: Callable[[], Searcher],
        launcher: Launcher,
    ) -> None:
        """Prepare a codebook that `fits`.

        Args:
            codes: (K, D) float32.
            bias: (K,) float32, for DOT.
            objective: quantity by which the winning code is chosen.
            fallback: factory of the searcher for rows that float32 cannot decide.
            launcher: what launches the kernels.
        """
        self._codes = _aligned(codes.detach().contiguous())
        self._bounds = ScoreBounds.of(codes, bias, objective, torch.float32)
        self._fallback = OnDemand(fallback, codes.device)
        self._launcher = launcher
        is_cuda = codes.device.type == "cuda"
        architecture = architecture_of(torch.cuda.get_device_capability(codes.device)) if is_cuda else ARCHITECTURES[0]
        self._variant = nearest(architecture, codes.shape[1])

    def search(self, rows: Tensor, counts: SearchCounts | None = None) -> Tensor:
        """Return the winning code of every row; see `Searcher.search`."""
        count, dim = rows.shape
        winners = torch.zeros(count, dtype=torch.int64, device=rows.device)
        if count == 0:
            return winners
        is_open = torch.ones(count, dtype=torch.int8, device=rows.device)
        norms = row_norms(rows, torch.float32)
        # All arrays of a part begin at a multiple of 16 bytes, as the kernels' signatures say.
        step = max(16, _MOST_ELEMENTS // dim // 16 * 16)
        for start in range(0, count, step):
            part = slice(start, start + step)
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
        count, dim = rows.shape
        # Triton launches on the current device, which may differ from the tensors' device.
        with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
            self._launcher.launch(
                self._variant,
                (-(-count // self._variant.block_rows), 1),
                [
                    _aligned(rows.detach().resolve_neg().float().contiguous()),
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
                ],
            )


def _aligned(array: Tensor) -> Tensor:
    """Return an array that begins at a multiple of 16 bytes; a slice of another array may not."""
    return array.clone() if array.data_ptr() % 16 else array
