"""The training loop: from latents to a codebook, the same for the same seed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqserve.errors import InvalidOption
from vqserve_server.codebooks.statistics import Statistics, StatisticsTally, code_groups
from vqserve_server.device import select_device
from vqserve_server.quantizers import AbstractQuantizer, measure_perplexity
from vqserve_server.search import prepare
from vqserve_tools.latents.rows import RandomRows
from vqserve_tools.progress import Progress, progress_of
from vqserve_tools.training.curve import Curve, Point
from vqserve_tools.training.initialisation import initial_codes
from vqserve_tools.training.learners import AdamLearner, CodeUsage, EmaLearner, Learner, draw_seeds
from vqserve_tools.training.options import TrainingOptions, TrainingPlan

# Reseeding ends after this part of the training, so that moved codes can settle.
_RESEED_SHARE = 0.8
_LR_SHARE = 0.2
_STEPS_PER_REPORT = 16
_ROWS_FOR_LR = 1 << 16
_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Quality of a codebook on rows.

    Attributes:
        mean_squared_error: mean of (decoded - latent)^2 over all elements.
        perplexity: exp of the entropy of code usage: K if all codes are used equally, 1 if one code has all rows.
        used_codes: number of codes that at least one row has.
    """

    mean_squared_error: float
    perplexity: float
    used_codes: int


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained codebook.

    Attributes:
        quantizer: quantizer on the CPU, in eval mode.
        quality: quality on all rows of the training.
        held_out: quality on the rows that were held out; None: there were none.
        curve: quality after some of the steps; empty unless it was asked for.
        plan: batch size and step counts of the training.
        codes_reseeded: number of moves of dead codes.
        statistics: usage and error on all rows of the training, for the file.
    """

    quantizer: AbstractQuantizer
    quality: Quality
    held_out: Quality | None
    curve: list[Point]
    plan: TrainingPlan
    codes_reseeded: int
    statistics: Statistics


def train(
    rows: RandomRows,
    options: TrainingOptions,
    *,
    held_out: RandomRows | None = None,
    with_curve: bool = False,
    progress: bool = False,
) -> Trained:
    """Train a codebook on latents.

    Args:
        rows: latents.
        options: options of the training. On the CPU of one machine the same options and rows give the same codebook,
            bit for bit.
        held_out: latents to measure the codebook on; they have no influence on it. None: there are none.
        with_curve: whether to measure the quality after some of the steps; that has no influence either.
        progress: whether to show progress on stderr, with error and perplexity.

    Raises:
        NonFiniteLatents: the latents hold NaN or infinity; the error names the position.
        InvalidShape: fewer rows, or fewer distinct rows, than codes.
        InvalidOption: the device does not exist, or the training diverged.
    """
    rows.check_finite()
    plan = options.plan(len(rows))
    rng = np.random.default_rng(options.seed)
    with _repeatable(torch.device(select_device(options.device))) as device:
        first = initial_codes(
            rows, options.num_codes, options.initialisation, rng=rng, device=device, progress=progress
        )
        learner = _learner(torch.from_numpy(first).to(device), rows, options, plan)
        curve = Curve(rows, held_out, steps=plan.steps, seed=options.seed, device=device) if with_curve else None
        codes_reseeded = _run(learner, rows, plan, curve, rng=rng, device=device, progress=progress)
        quantizer = learner.quantizer.eval()
        if not torch.isfinite(quantizer.code_rows()).all():
            raise InvalidOption("the training diverged: the codebook holds NaN or infinity; a smaller {lr=} may help")
        quality, statistics = measure_quality(quantizer, rows, device=device, progress=progress)
        new = None if held_out is None else measure_quality(quantizer, held_out, device=device, progress=progress)[0]
    return Trained(
        quantizer=quantizer.cpu(),
        quality=quality,
        held_out=new,
        curve=[] if curve is None else curve.points,
        plan=plan,
        codes_reseeded=codes_reseeded,
        statistics=statistics,
    )


@torch.no_grad()
def measure_quality(
    quantizer: AbstractQuantizer, rows: RandomRows, *, device: torch.device, progress: bool = False
) -> tuple[Quality, Statistics]:
    """Encode and decode all rows, and return the quality, and the statistics for the file.

    Args:
        quantizer: quantizer on `device`.
        rows: finite latents, at least one row.
        device: device of the computation.
        progress: whether to show progress on stderr.
    """
    counts = np.zeros(quantizer.num_codes, np.int64)
    tally = StatisticsTally(code_groups(quantizer))
    squares = 0.0
    with progress_of("measuring", len(rows), "row", shown=progress) as bar:
        for chunk in rows.chunks(_ROWS_AT_ONCE):
            latents = torch.from_numpy(chunk).to(device)
            found = quantizer.encode(latents)
            errors = (quantizer.decode(found) - latents).double().square()
            squares += float(errors.sum())
            ids = found.cpu().numpy()
            counts += np.bincount(ids, minlength=quantizer.num_codes)
            tally.add(ids[:, None], errors.mean(dim=1).cpu().numpy())
            bar.update(len(chunk))
    shares = counts[counts > 0] / len(rows)
    quality = Quality(
        mean_squared_error=squares / (len(rows) * rows.dim),
        perplexity=float(np.exp(-(shares * np.log(shares)).sum())),
        used_codes=int((counts > 0).sum()),
    )
    return quality, tally.statistics("the latents of vqserved train")


def _run(
    learner: Learner,
    rows: RandomRows,
    plan: TrainingPlan,
    curve: Curve | None,
    *,
    rng: np.random.Generator,
    device: torch.device,
    progress: bool,
) -> int:
    """Run all steps; return the number of moves of dead codes."""
    num_codes = learner.quantizer.num_codes
    usage = CodeUsage(num_codes, device)
    codes_reseeded = 0
    if curve is not None:
        curve.measure(learner.quantizer, 0)
    with progress_of("training", plan.steps, "step", shown=progress, is_main=True) as bar:
        for step, positions in enumerate(shuffled_batches(len(rows), plan.batch_size, plan.steps, rng)):
            batch = torch.from_numpy(rows.take(positions)).to(device)
            z_q, ids = learner.step(batch, step / plan.steps)
            usage.add(ids)
            if _reseeds_after(step, plan):
                dead = usage.take_dead()
                seeds = draw_seeds(batch, z_q, len(dead), rng)
                learner.place(dead[: len(seeds)], seeds)
                codes_reseeded += len(seeds)
            if progress and (step % _STEPS_PER_REPORT == 0 or step + 1 == plan.steps):
                _report(bar, (z_q - batch).square().mean(), ids, num_codes, codes_reseeded)
            if curve is not None:
                curve.measure(learner.quantizer, step + 1)
            bar.update()
    return codes_reseeded


def _reseeds_after(step: int, plan: TrainingPlan) -> bool:
    done = step + 1
    return plan.reseed_every > 0 and done % plan.reseed_every == 0 and done <= _RESEED_SHARE * plan.steps


def _report(bar: Progress, mean_squared_error: Tensor, ids: Tensor, num_codes: int, codes_reseeded: int) -> None:
    perplexity, _ = measure_perplexity(ids, num_codes)
    bar.set_postfix_str(
        f"mean squared error {float(mean_squared_error):.4g}, perplexity {float(perplexity):.1f}, "
        f"reseeded {codes_reseeded}"
    )


def _learner(codes: Tensor, rows: RandomRows, options: TrainingOptions, plan: TrainingPlan) -> Learner:
    if options.kind == "ema":
        return EmaLearner(codes, options, plan.batch_size)
    return AdamLearner(codes, options, options.lr or _LR_SHARE * _typical_error(rows, codes))


def _typical_error(rows: RandomRows, codes: Tensor) -> float:
    """Return the root mean squared error per element of the median row: the typical distance that codes must move.

    The standard deviation of the latents is too large for this if there are many codes, or a few outliers.
    """
    count = min(len(rows), _ROWS_FOR_LR)
    spread = torch.from_numpy(rows.take(np.linspace(0, len(rows) - 1, count).astype(np.int64))).to(codes.device)
    errors = (codes[prepare(codes).search(spread)] - spread).double().square().mean(dim=1)
    return float(errors.median().sqrt() or errors.mean().sqrt()) or 1.0


@contextmanager
def _repeatable(device: torch.device) -> Iterator[torch.device]:
    """Make torch compute the same whatever a caller has set; at the end, restore its random state and settings.

    CUDA uses kernels that add in a fixed order.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with device, torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield device
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def shuffled_batches(
    num_rows: int, batch_size: int, steps: int, rng: np.random.Generator
) -> Iterator[npt.NDArray[np.int64]]:
    """Yield `steps` batches of row positions, cut from one random permutation of all rows after another.

    Positions in a batch ascend, so that a file is read in order.
    """
    order, start = rng.permutation(num_rows), 0
    for _ in range(steps):
        batch = order[start : start + batch_size]
        start += batch_size
        if len(batch) < batch_size:
            order, start = rng.permutation(num_rows), batch_size - len(batch)
            batch = np.concatenate([batch, order[:start]])
        yield np.sort(batch)
