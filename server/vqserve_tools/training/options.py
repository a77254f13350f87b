"""Options of a training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vqserve.errors import InvalidOption
from vqserve_tools.flags import option

KINDS = ("ema", "vq")
INITIALISATIONS = ("kmeans++", "sample")
DEFAULT_STEPS = 1000
# In each step most codes should get a few rows, or the codebook follows the noise of its batches.
_ROWS_PER_CODE = 4
_LEAST_BATCH = 8192
# A code of average use gets no row in 32 chances with probability exp(-32), about 1e-14: such a code is dead.
_CHANCES_PER_CODE = 32
_LEAST_RESEED_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a codebook is trained.

    Attributes:
        kind: "ema" (EMAVectorQuantizer) or "vq" (VectorQuantizer with Adam).
        num_codes: K, rows of the codebook.
        batch_size: rows of a step; None: 4 for each code, at least 8192. Never more than the rows of the latents.
        steps: number of steps; None: from `epochs`, or 1000.
        epochs: number of passes over the latents, instead of `steps`.
        initialisation: "kmeans++" or "sample" (rows drawn uniformly).
        reseed_every: steps between two searches for dead codes; 0: no search; None: the steps in which a code of
            average use gets 32 rows, at least 20.
        seed: seed of all random choices.
        lr: first learning rate of Adam, in units of the latents (kind "vq"); None: a fifth of the median row's distance
            from its first code, per element.
        decay: decay of the running averages (kind "ema").
        beta: weight of the commitment loss. It is stored in the codebook file and has no effect on this training.
        device: "auto", "cpu" or "cuda".
    """

    kind: str = option("ema", "ema: running averages; vq: gradient descent", choices=KINDS)
    num_codes: int = option(1024, "number of codes (default: %(default)s)", type=int, metavar="K")
    batch_size: int | None = option(None, "rows of a step (default: 4 K, at least 8192)", type=int, metavar="ROWS")
    steps: int | None = option(
        None, f"number of batches (default: {DEFAULT_STEPS})", group="length", type=int, metavar="N"
    )
    epochs: float | None = option(
        None, "number of passes over the latents, instead of --steps", group="length", type=float, metavar="N"
    )
    initialisation: str = option(
        "kmeans++", "how the first codes are drawn (default: %(default)s)", flag="--init", choices=INITIALISATIONS
    )
    reseed_every: int | None = option(
        None,
        "steps between two searches for dead codes, which are moved; 0: no search (default: a code of average use has "
        "32 rows in them, at least 20)",
        type=int,
        metavar="STEPS",
    )
    seed: int = option(0, "seed of all random choices (default: %(default)s)", type=int)
    lr: float | None = option(
        None, "learning rate of Adam, for vq (default: a fifth of a typical first error)", type=float, metavar="STEP"
    )
    decay: float = option(0.99, "decay of the averages, for ema (default: %(default)s)", type=float)
    beta: float = option(0.25, "weight of the commitment loss to store (default: %(default)s)", type=float)
    device: str = option("auto", "device of the computation (default: %(default)s)", metavar="auto|cpu|cuda[:N]")

    def __post_init__(self) -> None:
        _require("kind", self.kind, self.kind in KINDS, f"one of {', '.join(KINDS)}")
        known = self.initialisation in INITIALISATIONS
        _require("initialisation", self.initialisation, known, f"one of {', '.join(INITIALISATIONS)}")
        _require("num_codes", self.num_codes, self.num_codes >= 1, "at least 1")
        _require("seed", self.seed, self.seed >= 0, "at least 0")
        _require("decay", self.decay, 0 <= self.decay < 1, "at least 0 and less than 1")
        _require("beta", self.beta, 0 <= self.beta < math.inf, "a finite number, at least 0")
        for name, least in (("batch_size", 1), ("steps", 1), ("reseed_every", 0)):
            value = getattr(self, name)
            _require(name, value, value is None or value >= least, f"at least {least}")
        for name in ("epochs", "lr"):
            value = getattr(self, name)
            _require(name, value, value is None or 0 < value < math.inf, "a finite number above 0")
        if self.steps is not None and self.epochs is not None:
            raise InvalidOption("give {steps=} or {epochs=}, not both")

    def plan(self, num_rows: int) -> TrainingPlan:
        """Return the batch size and the step counts for latents with `num_rows` rows."""
        batch = self.batch_size or max(_ROWS_PER_CODE * self.num_codes, _LEAST_BATCH)
        batch = max(1, min(batch, num_rows))
        steps = self.steps or DEFAULT_STEPS
        if self.epochs is not None:
            steps = max(1, math.ceil(self.epochs * num_rows / batch))
        every = self.reseed_every
        if every is None:
            every = max(_LEAST_RESEED_STEPS, math.ceil(_CHANCES_PER_CODE * self.num_codes / batch))
        return TrainingPlan(batch, steps, every)


@dataclass(frozen=True)
class TrainingPlan:
    """Sizes of one training: rows of a step, steps, and steps between two searches for dead codes (0: no search)."""

    batch_size: int
    steps: int
    reseed_every: int


def _require(name: str, value: object, holds: bool, what: str) -> None:
    if not holds:
        raise InvalidOption(f"{{option}} must be {what}, not {value!r}", option=name)
