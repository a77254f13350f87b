"""Dead codes: finding them, and moving them to rows of the batch without a jump.

A code is dead when no row chose it since the last look, over a span in which a code of average use has 32 of them. Its
new place is a row of the batch, drawn by k-means++: where codes are missing, and no two in one gap.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vqserve_server.quantizers import EMAVectorQuantizer, VectorQuantizer
from vqserve_tools.training.kmeans_plus_plus import draw_spread


class CodeUsage:
    """Which codes were chosen since the last look."""

    def __init__(self, num_codes: int, device: torch.device) -> None:
        self._used = torch.zeros(num_codes, dtype=torch.bool, device=device)

    def add(self, ids: Tensor) -> None:
        """Count the full ids of a batch, (n,) int64."""
        self._used[ids] = True

    def take_dead(self) -> Tensor:
        """Return the ids that nobody chose, (m,) int64, and look afresh from now on."""
        dead = (~self._used).nonzero().squeeze(1)
        self._used.zero_()
        return dead


def draw_seeds(batch: Tensor, z_q: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """Return at most `count` distinct rows of the batch, (m, D), spread over where it is quantized badly.

    Args:
        batch: (n, D) float32.
        z_q: (n, D), what the batch was quantized to.
        count: how many are wanted; fewer come where fewer distinct rows have an error.
        rng: fixes the choice.
    """
    # Equal rows would make equal codes, of which one would be dead for ever.
    rows, owner, counts = torch.unique(batch, dim=0, return_inverse=True, return_counts=True)
    errors = (z_q.detach() - batch).double().square().sum(dim=1)
    nearest = errors.new_zeros(len(rows)).index_copy_(0, owner, errors)
    weights = torch.where(nearest > 0, counts, 0).double().cpu().numpy()
    drawn = draw_spread(rows, weights, min(count, int((weights > 0).sum())), rng=rng, nearest=nearest)
    seeds: Tensor = rows[torch.from_numpy(drawn).to(rows.device)]
    return seeds


@torch.no_grad()
def place_ema_codes(quantizer: EMAVectorQuantizer, ids: Tensor, rows: Tensor, tokens_per_step: float) -> None:
    """Put codes at these rows with averages that agree with them, as if each had long had its share of the tokens.

    The update computes weight = embed_avg / smoothed(cluster_size). So cluster_size is what a code of average use has
    in the long run, tokens_per_step / K, and embed_avg is the row times it. A step in which no token comes scales both
    by `decay` and leaves the weight where it is; n tokens with mean m move it by the share of m in the average,
    n (1 - decay) / (cluster_size decay + n (1 - decay)). (At a cluster_size of 0 the first step would divide by eps.)

    Args:
        quantizer: changed in place.
        ids: (m,) codes to move.
        rows: (m, D) where to.
        tokens_per_step: rows in a batch.
    """
    embedding = quantizer.embedding
    share = tokens_per_step / quantizer.num_tokens
    embedding.weight[ids] = rows
    embedding.cluster_size[ids] = share
    embedding.embed_avg[ids] = rows * share


@torch.no_grad()
def place_vq_codes(
    quantizer: VectorQuantizer, ids: Tensor, rows: Tensor, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Put codes at these rows and let Adam forget where it was taking them.

    Args:
        quantizer: changed in place.
        ids: (m,) codes to move.
        rows: (m, D) where to.
        optimizer: its running moments of these codes become zero.
    """
    weight = quantizer.embedding.weight
    weight[ids] = rows
    if optimizer is not None:
        for name in ("exp_avg", "exp_avg_sq"):
            moment = optimizer.state[weight].get(name)
            if moment is not None:
                moment[ids] = 0
