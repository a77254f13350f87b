"""How a training went on: error and perplexity after some of its steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqserve_server.quantizers import AbstractQuantizer
from vqserve_server.search import prepare
from vqserve_tools.latents.rows import RandomRows

# A point costs about as much as a step: fewer than these, and as many rows as a usual batch.
_MOST_POINTS = 50
_MOST_ROWS = 1 << 14


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures of a codebook on a sample of rows: mean squared error per element, and perplexity."""

    error: float
    perplexity: float


@dataclass(frozen=True, kw_only=True)
class Point:
    """Figures after a number of steps; `held_out` is None if nothing is held out."""

    step: int
    training: Figures
    held_out: Figures | None


class Curve:
    """Measures a training after some of its steps, on the same rows each time.

    It draws nothing from the training's generator, so a training that is measured gives the same codebook.

    Attributes:
        points: what was measured, by step.
    """

    def __init__(
        self, training: RandomRows, held_out: RandomRows | None, *, steps: int, seed: int, device: torch.device
    ) -> None:
        """Choose the rows to measure on.

        Args:
            training: rows of the training, finite.
            held_out: rows that are held out; None: there are none.
            steps: steps of the training.
            seed: seed of the choice.
            device: device of the computation.
        """
        self.points: list[Point] = []
        self._steps = steps
        self._every = max(1, steps // _MOST_POINTS)
        rng = np.random.default_rng([seed, 3])
        self._training = _sample(training, rng, device)
        self._held_out = None if held_out is None else _sample(held_out, rng, device)

    @torch.no_grad()
    def measure(self, quantizer: AbstractQuantizer, step: int) -> None:
        """Measure a quantizer after a number of steps, if a point is due."""
        if step % self._every and step != self._steps:
            return
        codes = quantizer.code_rows().detach()
        if not torch.isfinite(codes).all():
            return
        held_out = None if self._held_out is None else _figures(codes, self._held_out)
        self.points.append(Point(step=step, training=_figures(codes, self._training), held_out=held_out))


def _sample(rows: RandomRows, rng: np.random.Generator, device: torch.device) -> Tensor:
    count = min(len(rows), _MOST_ROWS)
    return torch.from_numpy(rows.take(np.sort(rng.choice(len(rows), count, replace=False)))).to(device)


def _figures(codes: Tensor, rows: Tensor) -> Figures:
    ids = prepare(codes).search(rows)
    counts: npt.NDArray[np.int64] = np.bincount(ids.cpu().numpy())
    shares = counts[counts > 0] / len(rows)
    return Figures(
        error=float((codes[ids] - rows).double().square().mean()),
        perplexity=float(np.exp(-(shares * np.log(shares)).sum())),
    )


def draw_curve(points: list[Point], path: Path, *, title: str) -> None:
    """Draw error and perplexity over the steps.

    Args:
        points: what was measured, at least one.
        path: PNG file to write or replace.
        title: title of the picture.

    Raises:
        OSError: the file cannot be written.
    """
    # pyplot would open windows and change global state.
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure: Any = Figure(figsize=(11, 4.4), layout="constrained")
    figure.suptitle(title)
    steps = [point.step for point in points]
    held_out = [point.held_out for point in points if point.held_out is not None]
    for axes, name, label in zip(
        figure.subplots(1, 2), ("error", "perplexity"), ("mean squared error", "perplexity"), strict=True
    ):
        axes.plot(steps, [getattr(point.training, name) for point in points], label="training")
        if held_out:
            axes.plot(steps, [getattr(figures, name) for figures in held_out], label="held out", linestyle="--")
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110, format="png")
