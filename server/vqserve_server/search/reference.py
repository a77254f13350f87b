"""The reference backend: float64 in row tiles, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from vqserve_server.search.bounds import SMALLEST_SUBNORMAL, gamma, norms_above
from vqserve_server.search.searcher import Objective, Searcher
from vqserve_server.search.settle import Arbiter

# Elements of a (rows, codes) tile: 8 MiB in float64, of which a handful live at once.
_TILE_ELEMENTS = 1 << 20


class ReferenceSearcher(Searcher):
    """Every score in float64 with its error bound; rows that stay open go to the arbiter."""

    backend = "reference"

    def __init__(self, codes: Tensor, bias: Tensor | None, objective: Objective) -> None:
        """Take codes (K, D) and, for DOT, bias (K,), float32 or float64."""
        self._arbiter = Arbiter(codes, bias, objective)
        dim = codes.shape[1]
        wide = codes.detach().to(torch.float64)
        self._codes_t = wide.T.contiguous()
        # score = z . a + offset, each within relative * (|z| |a| + size) + absolute of its exact value: 2 D
        # products and as many additions, and a few more for the bound's own roundings.
        relative = gamma(2 * dim + 16, torch.float64)
        self._absolute = 8.0 * dim * SMALLEST_SUBNORMAL[torch.float64]
        if objective is Objective.L2:
            squares = (wide * wide).sum(dim=1)
            self._offset = -0.5 * squares
            size = 0.5 * squares
        else:
            self._offset = wide.new_zeros(codes.shape[0]) if bias is None else bias.detach().to(torch.float64)
            size = self._offset.abs()
        self._error_per_norm = relative * norms_above(codes)
        self._error_constant = relative * size + self._absolute
        self._tile_rows = max(1, _TILE_ELEMENTS // codes.shape[0])

    def search(self, rows: Tensor) -> Tensor:
        """Return the winning code of every row; see `Searcher.search`."""
        winners = torch.empty(rows.shape[0], dtype=torch.int64, device=rows.device)
        for start in range(0, rows.shape[0], self._tile_rows):
            tile = slice(start, start + self._tile_rows)
            winners[tile] = self._search_tile(rows[tile])
        return winners

    def _search_tile(self, rows: Tensor) -> Tensor:
        scores = torch.addmm(self._offset, rows.to(torch.float64), self._codes_t)
        error = torch.addmm(self._error_constant, norms_above(rows)[:, None], self._error_per_norm[None, :])
        lower, winners = (scores - error).max(dim=1)
        # The winner's own upper bound is among these; a row whose bound overflowed keeps all codes (the
        # comparison is written so that a NaN is kept).
        could_win = ~(scores.add_(error) < lower[:, None])
        is_open = (could_win.sum(dim=1) > 1) & torch.isfinite(rows).all(dim=1)
        open_rows = torch.nonzero(is_open)[:, 0]
        if open_rows.numel():
            pairs = torch.nonzero(could_win[open_rows]).cpu().numpy()
            settled = self._arbiter.settle(rows[open_rows].cpu().numpy(), pairs[:, 0], pairs[:, 1])
            winners[open_rows] = torch.from_numpy(settled).to(rows.device)
        return winners
