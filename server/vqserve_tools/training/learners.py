"""The two ways in which a codebook learns from a batch: running averages, and gradient descent.

Dead codes are found here too, and moved to rows of the batch without a jump. A code is dead when no row chose it since
the last look, over a span in which a code of average use has 32 of them. Its new place is a row of the batch, drawn by
k-means++: where codes are missing, and no two in one gap.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from vqserve_server.quantizers import AbstractQuantizer, EMAVectorQuantizer, VectorQuantizer
from vqserve_tools.training.initialisation import draw_spread
from vqserve_tools.training.options import TrainingOptions


class Learner(ABC):
    """A quantizer with what changes it."""

    quantizer: AbstractQuantizer

    @abstractmethod
    def step(self, batch: Tensor, done: float) -> tuple[Tensor, Tensor]:
        """Learn from one batch.

        Args:
            batch: (n, D) float32.
            done: how much of the training lies behind, in [0, 1).

        Returns:
            z_q (n, D), and the ids (n,), by the codes before the step.
        """

    @abstractmethod
    def place(self, ids: Tensor, rows: Tensor) -> None:
        """Move codes (m,) to rows (m, D)."""


class EmaLearner(Learner):
    """Learns in the quantizer's own forward."""

    def __init__(self, codes: Tensor, options: TrainingOptions, batch_size: int) -> None:
        num_codes, dim = codes.shape
        self.quantizer: EMAVectorQuantizer = EMAVectorQuantizer(num_codes, dim, options.beta, decay=options.decay)
        self.quantizer.to(codes.device).train()
        self._tokens_per_step = batch_size
        self.place(torch.arange(num_codes, device=codes.device), codes)

    @torch.no_grad()
    def step(self, batch: Tensor, done: float) -> tuple[Tensor, Tensor]:
        """See Learner."""
        del done
        z_q, info = self.quantizer(batch)
        return z_q, info["encoding_indices"]

    def place(self, ids: Tensor, rows: Tensor) -> None:
        """See Learner."""
        place_ema_codes(self.quantizer, ids, rows, self._tokens_per_step)


class AdamLearner(Learner):
    """Descends the codebook loss; the step size falls to zero in a straight line, so that the codes come to rest."""

    def __init__(self, codes: Tensor, options: TrainingOptions, lr: float) -> None:
        num_codes, dim = codes.shape
        self.quantizer: VectorQuantizer = VectorQuantizer(num_codes, dim, options.beta)
        self.quantizer.to(codes.device).train()
        place_vq_codes(self.quantizer, torch.arange(num_codes, device=codes.device), codes)
        self._lr = lr
        self._optimizer = torch.optim.Adam(self.quantizer.parameters(), lr=lr)

    def step(self, batch: Tensor, done: float) -> tuple[Tensor, Tensor]:
        """See Learner."""
        self._optimizer.param_groups[0]["lr"] = self._lr * (1.0 - done)
        self._optimizer.zero_grad()
        z_q, info = self.quantizer(batch)
        loss: Tensor = info[self.quantizer.loss_key]
        torch.autograd.backward(loss)
        self._optimizer.step()
        return z_q.detach(), info["min_encoding_indices"]

    def place(self, ids: Tensor, rows: Tensor) -> None:
        """See Learner."""
        place_vq_codes(self.quantizer, ids, rows, self._optimizer)


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
