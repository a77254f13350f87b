"""The two ways in which a codebook learns from a batch: running averages, and gradient descent."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from vqserve_server.quantizers import AbstractQuantizer, EMAVectorQuantizer, VectorQuantizer
from vqserve_tools.training.options import TrainingOptions
from vqserve_tools.training.reseeding import place_ema_codes, place_vq_codes


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
