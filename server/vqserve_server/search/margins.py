"""How good the winners are, and by how much they win: for reports, not for the way of a request."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vqserve_server.search.bounds import ScoreBounds
from vqserve_server.search.searcher import Objective

# Elements of a (rows, codes) tile in float64, of which a few live at once.
_TILE_ELEMENTS = 1 << 20


@dataclass(frozen=True, eq=False)
class Margins:
    """What winners are worth, in float64.

    Attributes:
        value: (n,) the squared distance |z - a|^2 of each winner for L2, its score z . a + b for DOT.
        gap: (n,) how far the best other code is behind, not below zero; infinite where there is no other.
    """

    value: Tensor
    gap: Tensor


def margins(
    codes: Tensor, rows: Tensor, winners: Tensor, *, objective: Objective = Objective.L2, bias: Tensor | None = None
) -> Margins:
    """Return what the winners of rows are worth, and by how much they win.

    Args:
        codes: (K, D) float32 or float64.
        rows: (n, D) float32 or float64, finite, on the codes' device.
        winners: (n,) int64, as `Searcher.search` returns them.
        objective: what the winners are best at.
        bias: (K,), added to the scores of DOT.
    """
    wide = codes.detach().double()
    offset = ScoreBounds.of(codes, bias, objective, torch.float64).offset
    value = torch.empty(rows.shape[0], dtype=torch.float64, device=rows.device)
    gap = torch.full_like(value, torch.inf)
    step = max(1, _TILE_ELEMENTS // codes.shape[0])
    for start in range(0, rows.shape[0], step):
        tile = slice(start, start + step)
        z, won = rows[tile].double(), winners[tile]
        value[tile] = _worth(z, wide[won], offset[won], objective)
        if codes.shape[0] > 1:
            scores = torch.addmm(offset, z, wide.T).scatter_(1, won[:, None], -torch.inf)
            other = scores.argmax(dim=1)
            behind = _worth(z, wide[other], offset[other], objective) - value[tile]
            gap[tile] = (behind if objective is Objective.L2 else -behind).clamp_min(0.0)
    return Margins(value, gap)


def _worth(z: Tensor, codes: Tensor, offset: Tensor, objective: Objective) -> Tensor:
    if objective is Objective.L2:
        # Not from the scores, in which the squares of long rows would cancel.
        return (z - codes).square().sum(dim=1)
    return (z * codes).sum(dim=1) + offset
