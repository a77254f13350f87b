"""Search by torch's matrix product, tile by tile, on any device: in float32, or in float64 as the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vqserve_server.search.bounds import ScoreBounds, row_norms
from vqserve_server.search.denormals import copy_as_float64, denormals_enabled, to_float64
from vqserve_server.search.exact import Arbiter
from vqserve_server.search.searcher import Objective, OnDemand, SearchCounts, Searcher

# Most bytes of one (rows, codes) tile, and of its codes. About five tiles are in memory at once. On the CPU a tile
# should stay in the caches. On CUDA it costs about sixty launches, so it should keep the device busy for longer.
_TILE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
# Where a GPU has little memory left, a tile takes at most this share of it.
_SHARE_OF_FREE = 8
# A row goes to the fallback if more codes than this are within the bound, or if its sums may overflow.
_CROWD = 64


@dataclass(frozen=True, eq=False)
class _Workspace:
    """Buffers of one search, reused for all tiles: with new buffers for each tile, memory grew with their number."""

    codes: Tensor
    scores: Tensor
    errors: Tensor
    lower: Tensor
    could_win: Tensor

    @classmethod
    def of(cls, rows: int, num_codes: int, codes: Tensor, dtype: torch.dtype) -> _Workspace:
        """Allocate buffers for tiles of `rows` rows and `num_codes` codes."""
        scores, errors, lower = torch.empty(3, rows, num_codes, dtype=dtype, device=codes.device)
        return cls(
            codes=torch.empty(num_codes, codes.shape[1], dtype=dtype, device=codes.device),
            scores=scores,
            errors=errors,
            lower=lower,
            could_win=torch.empty(rows, num_codes, dtype=torch.bool, device=codes.device),
        )


class TiledSearcher(Searcher):
    """Computes every score with an error bound; the arbiter decides among the codes within the bound of the best."""

    def __init__(
        self,
        codes: Tensor,
        bias: Tensor | None,
        objective: Objective,
        *,
        dtype: torch.dtype,
        fallback: Callable[[], Searcher] | None = None,
    ) -> None:
        """Prepare a codebook on any device.

        Args:
            codes: (K, D) float32 or float64.
            bias: (K,), added to the scores of DOT.
            objective: quantity by which the winning code is chosen.
            dtype: type of the scores, float32 or float64.
            fallback: factory of a float64 searcher. It decides rows that are near very many codes, and all rows while
                the process allows TensorFloat-32 or another reduced precision. None, for float64: the arbiter decides
                them.
        """
        self.backend = "reference" if dtype == torch.float64 else "torch"
        self._dtype = dtype
        self._fallback = None if fallback is None else OnDemand(fallback, codes.device)
        self._arbiter = Arbiter(codes, bias, objective)
        self._codes = codes.detach()
        self._bounds = ScoreBounds.of(codes, bias, objective, dtype)
        num_codes, dim = codes.shape
        free = free_bytes(codes.device)
        self._tile_rows, self._tile_codes = tile_shape(num_codes, dim, dtype, codes.device, free)

    @denormals_enabled()
    def search(self, rows: Tensor, counts: SearchCounts | None = None) -> Tensor:
        """Return the winning code of every row; see `Searcher.search`."""
        if self._dtype == torch.float32 and self._fallback is not None and _may_be_reduced(rows.device):
            reason = "the process allows float32 products of fewer bits, as by torch.set_float32_matmul_precision"
            return self._fallback(reason).search(rows, counts)
        counts = counts or SearchCounts()
        winners = torch.empty(rows.shape[0], dtype=torch.int64, device=rows.device)
        space = _Workspace.of(min(rows.shape[0], self._tile_rows), self._tile_codes, self._codes, self._dtype)
        for start in range(0, rows.shape[0], self._tile_rows):
            tile = slice(start, start + self._tile_rows)
            winners[tile] = self._search_tile(rows[tile].detach(), space, counts)
        return winners

    def _search_tile(self, rows: Tensor, space: _Workspace, counts: SearchCounts) -> Tensor:
        # The float32 bounds allow for numbers that are flushed to zero. Float64 bounds that did would be too wide, so
        # the conversion to float64 is exact instead.
        is_wide = self._dtype == torch.float64
        bounds, narrow = self._bounds, to_float64(rows) if is_wide else rows.to(torch.float32)
        norms = row_norms(narrow if is_wide else rows, self._dtype)[:, None]
        too_long = ~(norms[:, 0] <= bounds.longest_row)
        best = torch.full((rows.shape[0],), -torch.inf, dtype=self._dtype, device=rows.device)
        winners = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
        near = torch.zeros_like(winners)
        found = []
        for start in range(0, self._codes.shape[0], self._tile_codes):
            window = slice(start, start + self._tile_codes)
            own = slice(0, rows.shape[0]), slice(0, bounds.offset[window].shape[0])
            codes = (copy_as_float64 if is_wide else Tensor.copy_)(space.codes[own[1]], self._codes[window])
            scores = torch.addmm(bounds.offset[window], narrow, codes.T, out=space.scores[own])
            error = torch.addmm(bounds.base[window], norms, bounds.slope[None, window], out=space.errors[own])
            lower, place = torch.sub(scores, error, out=space.lower[own]).max(dim=1)
            winners = torch.where(lower > best, place + start, winners)
            # A bound that overflowed is NaN here and stays NaN, so that the row keeps all its codes as candidates.
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
        is_candidate = ~(bound < best[row]) & ~crowded[row]
        settled = self._settle(rows, winners, row[is_candidate], code[is_candidate], is_real)
        left = int(crowded.sum())
        if left:
            winners[crowded] = self._search_crowded(rows[crowded])
        # The arbiter decides what float64 cannot, so the same rows count twice.
        counts.add(rows=rows.shape[0], rechecked=settled + left, arbitrated=settled + left)
        return winners

    def _settle(self, rows: Tensor, winners: Tensor, row: Tensor, code: Tensor, is_real: Tensor) -> int:
        """Decide the rows that have several (row, code) pairs; return the number of these rows."""
        is_open = (torch.bincount(row, minlength=rows.shape[0]) > 1) & is_real
        open_rows = torch.nonzero(is_open)[:, 0]
        if not open_rows.numel():
            return 0
        is_pair = is_open[row]
        position = torch.cumsum(is_open, 0) - 1
        pair_row, by_row = torch.sort(position[row[is_pair]], stable=True)
        settled = self._arbiter.settle(
            rows[open_rows].cpu().numpy(), pair_row.cpu().numpy(), code[is_pair][by_row].cpu().numpy()
        )
        winners[open_rows] = torch.from_numpy(settled).to(rows.device)
        return open_rows.numel()

    def _search_crowded(self, rows: Tensor) -> Tensor:
        # Rows that are near very many codes are often equal, for example all zeros: search each distinct row once.
        distinct, inverse = torch.unique(rows, dim=0, return_inverse=True)
        if self._fallback is not None:
            return self._fallback(f"rows that are near more than {_CROWD} codes, or too long").search(distinct)[inverse]
        every_code = np.arange(self._codes.shape[0])
        first = np.zeros_like(every_code)
        winners = [self._arbiter.settle(row[None].cpu().numpy(), first, every_code) for row in distinct]
        return torch.from_numpy(np.concatenate(winners)).to(rows.device)[inverse]


def tile_shape(
    num_codes: int, dim: int, dtype: torch.dtype, device: torch.device, free: int | None = None
) -> tuple[int, int]:
    """Return the numbers of rows and of codes of one tile.

    Args:
        num_codes: number of codes of the codebook.
        dim: components of a code.
        dtype: type of the scores.
        device: device that computes them.
        free: bytes of its memory that are free; None: more than enough.
    """
    size = _TILE_BYTES.get(device.type, _TILE_BYTES["cpu"])
    if free is not None:
        size = max(_TILE_BYTES["cpu"], min(size, free // _SHARE_OF_FREE))
    most = size // dtype.itemsize
    codes = max(1, min(num_codes, most // dim))
    return max(1, most // codes), codes


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that can be allocated on a CUDA device; None for other devices."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    # What torch keeps of memory that it has freed can be allocated as well.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _may_be_reduced(device: torch.device) -> bool:
    """Return whether torch may compute float32 products with fewer bits, so that the bounds do not hold.

    torch has two settings for this, and both are read: the older one raises when the newer one was used.
    """
    try:
        if torch.get_float32_matmul_precision() != "highest":
            return True
    except RuntimeError:
        return True
    product = torch.backends.cuda.matmul if device.type == "cuda" else getattr(torch.backends.mkldnn, "matmul", None)
    levels = torch.backends, torch.backends.mkldnn, product
    return any(getattr(level, "fp32_precision", "none") not in ("none", "ieee") for level in levels)
