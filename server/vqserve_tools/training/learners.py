"""Two ways to train a codebook on batches: running averages, and gradient descent; and the reseeding of dead codes.

A code is dead if no row of the last `reseed_every` steps chose it; in this time a code of average use gets 32 rows. A
dead code is moved to a row of the batch. k-means++ draws this row: it favours regions with few codes, and seldom puts
two codes into one gap. The state of the optimizer or of the averages is set so that the code stays there.
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
    """A quantizer and its update rule."""

    quantizer: AbstractQuantizer

    @abstractmethod
    def step(self, batch: Tensor, done: float) -> tuple[Tensor, Tensor]:
        """Learn from one batch.

        Args:
            batch: (n, D) float32.
            done: finished part of the training, in [0, 1).

        Returns:
            z_q (n, D) and ids (n,), computed with the codes before the step.
        """

    @abstractmethod
    def place(self, ids: Tensor, rows: Tensor) -> None:
        """Move codes (m,) to rows (m, D)."""


class EmaLearner(Learner):
    """Running averages, which the quantizer updates in its forward."""

    def __init__(self, codes: Tensor, options: TrainingOptions, batch_size: int) -> None:
        num_codes, dim = codes.shape
        self.quantizer: EMAVectorQuantizer = EMAVectorQuantizer(num_codes, dim, options.beta, decay=options.decay)
        self.quantizer.to(codes.device, codes.dtype).train()
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
    """Gradient descent of the codebook loss; the learning rate falls linearly to zero, so that the codes settle."""

    def __init__(self, codes: Tensor, options: TrainingOptions, lr: float) -> None:
        num_codes, dim = codes.shape
        self.quantizer: VectorQuantizer = VectorQuantizer(num_codes, dim, options.beta)
        self.quantizer.to(codes.device, codes.dtype).train()
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
    """Records which codes were chosen since the last search for dead codes."""

    def __init__(self, num_codes: int, device: torch.device) -> None:
        self._used = torch.zeros(num_codes, dtype=torch.bool, device=device)

    def add(self, ids: Tensor) -> None:
        """Record the full ids of a batch, (n,) int64."""
        self._used[ids] = True

    def take_dead(self) -> Tensor:
        """Return the ids that no row chose, (m,) int64, and start a new record."""
        dead = (~self._used).nonzero().squeeze(1)
        self._used.zero_()
        return dead


def draw_seeds(batch: Tensor, z_q: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """Return at most `count` distinct rows of the batch, (m, D), spread over the rows with a large error.

    Args:
        batch: (n, D) float32.
        z_q: (n, D) quantized batch.
        count: number of rows; fewer are returned if fewer distinct rows have an error.
        rng: generator of all random choices.
    """
    # Equal rows would make equal codes, and all but the first of them would stay dead.
    rows, owner, counts = torch.unique(batch, dim=0, return_inverse=True, return_counts=True)
    errors = (z_q.detach() - batch).double().square().sum(dim=1)
    nearest = errors.new_zeros(len(rows)).index_copy_(0, owner, errors)
    weights = torch.where(nearest > 0, counts, 0).double().cpu().numpy()
    drawn = draw_spread(rows, weights, min(count, int((weights > 0).sum())), rng=rng, nearest=nearest)
    seeds: Tensor = rows[torch.from_numpy(drawn).to(rows.device)]
    return seeds


@torch.no_grad()
def place_ema_codes(quantizer: EMAVectorQuantizer, ids: Tensor, rows: Tensor, tokens_per_step: float) -> None:
    """Move codes to these rows, and set their averages as if each code had had average use for a long time.

    The update computes weight = embed_avg / smoothed(cluster_size). So cluster_size becomes tokens_per_step / K, the
    long-run value of a code of average use, and embed_avg becomes the row times cluster_size. A step without a token of
    the code scales both by `decay` and does not change the weight; n tokens with mean m move the weight towards m by
    the fraction n (1 - decay) / (cluster_size decay + n (1 - decay)). With a cluster_size of 0 the first step would
    divide by eps.

    Args:
        quantizer: quantizer to change in place.
        ids: (m,) codes to move.
        rows: (m, D) new positions.
        tokens_per_step: rows of a batch.
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
    """Move codes to these rows, and reset Adam's moments of these codes.

    Args:
        quantizer: quantizer to change in place.
        ids: (m,) codes to move.
        rows: (m, D) new positions.
        optimizer: optimizer whose moments of these codes become zero; None: there is none yet.
    """
    weight = quantizer.embedding.weight
    weight[ids] = rows
    if optimizer is not None:
        for name in ("exp_avg", "exp_avg_sq"):
            moment = optimizer.state[weight].get(name)
            if moment is not None:
                moment[ids] = 0
