"""Search with torch's matrix product in tiles, on any device: in float32, or in float64 as the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vqserve_server.search.bounds import ScoreBounds, row_norms
from vqserve_server.search.denormals import kept, widen_into, widened
from vqserve_server.search.exact import Arbiter
from vqserve_server.search.searcher import Objective, OnDemand, SearchCounts, Searcher

# Bytes of a (rows, codes) tile, of which a handful live at once, and of the codes of one tile.
_TILE_BYTES = 1 << 22
_CODES_BYTES = 1 << 22
# A row with more codes than this within the bound is searched by other means, as is one whose sums may overflow.
_CROWD = 64


@dataclass(frozen=True, eq=False)
class _Workspace:
    """The memory of one search, the same for all tiles: made anew for each, it grew with their number."""

    codes: Tensor
    scores: Tensor
    errors: Tensor
    lower: Tensor
    could_win: Tensor

    @classmethod
    def of(cls, rows: int, num_codes: int, codes: Tensor, dtype: torch.dtype) -> _Workspace:
        """Return room for tiles of that many rows and codes."""
        scores, errors, lower = torch.empty(3, rows, num_codes, dtype=dtype, device=codes.device)
        return cls(
            codes=torch.empty(num_codes, codes.shape[1], dtype=dtype, device=codes.device),
            scores=scores,
            errors=errors,
            lower=lower,
            could_win=torch.empty(rows, num_codes, dtype=torch.bool, device=codes.device),
        )


class TiledSearcher(Searcher):
    """Every score with its error bound; codes within the bound of the best are settled by the arbiter."""

    def __init__(
        self,
        codes: Tensor,
        bias: Tensor | None,
        objective: Objective,
        *,
        dtype: torch.dtype,
        fallback: Callable[[], Searcher] | None = None,
    ) -> None:
        """Take a codebook on any device.

        Args:
            codes: (K, D) float32 or float64.
            bias: (K,), added to the scores of DOT.
            objective: what the winning code is best at.
            dtype: of the scores, float32 or float64.
            fallback: makes a searcher in float64 for rows that are near to very many codes, and for all rows while the
                process allows TensorFloat-32 or the like; None, for float64: the arbiter sees to them.
        """
        self.backend = "reference" if dtype == torch.float64 else "torch"
        self._dtype = dtype
        self._fallback = None if fallback is None else OnDemand(fallback, codes.device)
        self._arbiter = Arbiter(codes, bias, objective)
        self._codes = codes.detach()
        self._bounds = ScoreBounds.of(codes, bias, objective, dtype)
        num_codes, dim = codes.shape
        itemsize = dtype.itemsize
        self._tile_codes = max(1, min(num_codes, _CODES_BYTES // (dim * itemsize), _TILE_BYTES // itemsize))
        self._tile_rows = max(1, _TILE_BYTES // (self._tile_codes * itemsize))

    @kept()
    def search(self, rows: Tensor, counts: SearchCounts | None = None) -> Tensor:
        """Return the winning code of every row; see `Searcher.search`."""
        if self._dtype == torch.float32 and self._fallback is not None and _may_be_reduced(rows.device):
            return self._fallback().search(rows, counts)
        counts = counts or SearchCounts()
        winners = torch.empty(rows.shape[0], dtype=torch.int64, device=rows.device)
        space = _Workspace.of(min(rows.shape[0], self._tile_rows), self._tile_codes, self._codes, self._dtype)
        for start in range(0, rows.shape[0], self._tile_rows):
            tile = slice(start, start + self._tile_rows)
            winners[tile] = self._search_tile(rows[tile].detach(), space, counts)
        return winners

    def _search_tile(self, rows: Tensor, space: _Workspace, counts: SearchCounts) -> Tensor:
        # The bounds of float32 have room for what may happen to subnormal numbers; those of float64 would be useless.
        is_wide = self._dtype == torch.float64
        bounds, narrow = self._bounds, widened(rows) if is_wide else rows.to(torch.float32)
        norms = row_norms(narrow if is_wide else rows, self._dtype)[:, None]
        too_long = ~(norms[:, 0] <= bounds.longest_row)
        best = torch.full((rows.shape[0],), -torch.inf, dtype=self._dtype, device=rows.device)
        winners = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
        near = torch.zeros_like(winners)
        found = []
        for start in range(0, self._codes.shape[0], self._tile_codes):
            window = slice(start, start + self._tile_codes)
            own = slice(0, rows.shape[0]), slice(0, bounds.offset[window].shape[0])
            codes = (widen_into if is_wide else Tensor.copy_)(space.codes[own[1]], self._codes[window])
            scores = torch.addmm(bounds.offset[window], narrow, codes.T, out=space.scores[own])
            error = torch.addmm(bounds.base[window], norms, bounds.slope[None, window], out=space.errors[own])
            lower, place = torch.sub(scores, error, out=space.lower[own]).max(dim=1)
            winners = torch.where(lower > best, place + start, winners)
            # A bound that overflowed is a NaN here, which stays: the row keeps all its codes.
            best = torch.maximum(best, lower)
            upper = scores.add_(error)
            could_win = torch.lt(upper, best[:, None], out=space.could_win[own]).logical_not_()
            near += could_win.sum(dim=1)
            could_win &= (near <= _CROWD)[:, None]
            row, code = torch.nonzero(could_win, as_tuple=True)
            found.append((row, code + start, upper[row, code]))
        row, code, bound = (torch.cat(parts) for parts in zip(*found, strict=True))
        is_real = torch.isfinite(rows).all(dim=1)
        crowded = ((near > _CROWD) | too_long) & is_real
        kept = ~(bound < best[row]) & ~crowded[row]
        settled = self._settle(rows, winners, row[kept], code[kept], is_real)
        left = int(crowded.sum())
        if left:
            winners[crowded] = self._search_crowded(rows[crowded])
        # The arbiter begins where float64 ends.
        counts.add(rows=rows.shape[0], rechecked=settled + left, arbitrated=settled + left)
        return winners

    def _settle(self, rows: Tensor, winners: Tensor, row: Tensor, code: Tensor, is_real: Tensor) -> int:
        """Settle the rows that have several (row, code) pairs, and return how many they are."""
        is_open = (torch.bincount(row, minlength=rows.shape[0]) > 1) & is_real
        open_rows = torch.nonzero(is_open)[:, 0]
        if not open_rows.numel():
            return 0
        kept = is_open[row]
        position = torch.cumsum(is_open, 0) - 1
        pair_row, by_row = torch.sort(position[row[kept]], stable=True)
        settled = self._arbiter.settle(
            rows[open_rows].cpu().numpy(), pair_row.cpu().numpy(), code[kept][by_row].cpu().numpy()
        )
        winners[open_rows] = torch.from_numpy(settled).to(rows.device)
        return open_rows.numel()

    def _search_crowded(self, rows: Tensor) -> Tensor:
        # Rows that are near to very many codes are often all the same: zeros, say.
        distinct, inverse = torch.unique(rows, dim=0, return_inverse=True)
        if self._fallback is not None:
            return self._fallback().search(distinct)[inverse]
        every_code = np.arange(self._codes.shape[0])
        first = np.zeros_like(every_code)
        winners = [self._arbiter.settle(row[None].cpu().numpy(), first, every_code) for row in distinct]
        return torch.from_numpy(np.concatenate(winners)).to(rows.device)[inverse]


def _may_be_reduced(device: torch.device) -> bool:
    """Return whether the process lets float32 products be computed with fewer bits, outside the bounds.

    Both of torch's ways of allowing it are asked: the older one raises when the newer one was used.
    """
    try:
        if torch.get_float32_matmul_precision() != "highest":
            return True
    except RuntimeError:
        return True
    product = torch.backends.cuda.matmul if device.type == "cuda" else getattr(torch.backends.mkldnn, "matmul", None)
    levels = torch.backends, torch.backends.mkldnn, product
    return any(getattr(level, "fp32_precision", "none") not in ("none", "ieee") for level in levels)
