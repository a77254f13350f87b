"""The first codes of a training: distinct rows of the latents.

`draw_spread` draws points that spread over a set, each with a probability in proportion to its squared distance from
the points drawn before: Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", 2007. Once there are
many points it draws several in a round, as Bahmani et al. do in "Scalable k-means++", 2012.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqserve.errors import InvalidShape
from vqserve_tools.latents.rows import RandomRows
from vqserve_tools.progress import progress_of

# Rows that are sampled for each code: more rows cost time and hardly change the positions of the codes.
_SAMPLES_PER_CODE = 16
_LEAST_SAMPLES = 1 << 15
# The first points are drawn one by one. Later a round draws one point for each 64 drawn before, and computes its
# distances by one matrix product. Two points of a round seldom fall into one gap; if they do, reseeding moves them.
_DRAWN_SINGLY = 512
_ROUND_SHARE = 64
_DISTANCES_AT_ONCE = 1 << 24
# Distinct points whose distance is rounded to 0 can still be drawn, after all others.
_LEAST = np.finfo(np.float64).tiny ** 0.5
# Limit of squared distances, in units of the set's extent, so that they do not overflow.
_FAR = 1e30


def initial_codes(
    rows: RandomRows, num_codes: int, method: str, *, rng: np.random.Generator, device: torch.device, progress: bool
) -> npt.NDArray[np.float32]:
    """Return `num_codes` distinct rows, (K, D) float32.

    Args:
        rows: latents, finite.
        num_codes: number of codes K.
        method: "sample" (uniform over the rows) or "kmeans++" (each next row in proportion to its squared distance
            from the nearest row chosen so far).
        rng: generator of all random choices.
        device: device that computes the distances.
        progress: whether to show progress on stderr.

    Raises:
        InvalidShape: fewer rows, or fewer distinct rows, than codes.
    """
    if len(rows) < num_codes:
        raise InvalidShape(f"{len(rows)} rows are too few for {num_codes} codes", array="latents")
    samples = min(len(rows), max(_SAMPLES_PER_CODE * num_codes, _LEAST_SAMPLES))
    drawn = rows.take(np.sort(rng.choice(len(rows), samples, replace=False, shuffle=False)))
    candidates, counts = np.unique(drawn, axis=0, return_counts=True)
    if len(candidates) < num_codes:
        raise InvalidShape(
            f"{samples} rows with {len(candidates)} distinct among them are too few for {num_codes} codes",
            array="latents",
        )
    weights = counts.astype(np.float64)
    if method == "sample":
        return candidates[choose_weighted(weights, num_codes, rng)]
    with progress_of("k-means++", num_codes, "code", shown=progress) as bar:
        points = torch.from_numpy(candidates).to(device)
        return candidates[draw_spread(points, weights, num_codes, rng=rng, on_round=bar.update)]


def draw_spread(
    points: Tensor,
    weights: npt.NDArray[np.float64],
    count: int,
    *,
    rng: np.random.Generator,
    nearest: Tensor | None = None,
    on_round: Callable[[int], object] = lambda drawn: None,
) -> npt.NDArray[np.int64]:
    """Draw distinct points.

    Args:
        points: (n, D) float32, distinct.
        weights: (n,) number of copies of each point; a point of weight 0 is never drawn.
        count: number of points to draw, at most the number of positive weights.
        rng: generator of all random choices.
        nearest: (n,) squared distances to the existing points; None: there are none, and the first point is drawn by
            weight alone.
        on_round: called after each round with the number of points drawn in it.

    Returns:
        (count,) positions in the order in which they were drawn.
    """
    # Centring reduces the cancellation in |x|^2 - 2 x.c + |c|^2; scaling prevents overflow.
    points = points.double() - points.double().mean(dim=0)
    scale = float(points.abs().max()) or 1.0
    points = (points / scale).float()
    if nearest is None:
        lowest = torch.full((len(points),), math.inf, device=points.device)
        left = weights.copy()
    else:
        lowest = (nearest.double() / scale**2).clamp(max=_FAR).float()
        left = weights * np.maximum(lowest.double().cpu().numpy(), _LEAST)
    rounds: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
    total = 0
    while total < count:
        size = 1 if total < _DRAWN_SINGLY else min(total // _ROUND_SHARE, count - total)
        drawn = choose_weighted(left, size, rng)
        rounds.append(drawn)
        total += size
        on_round(size)
        _lower_distances(lowest, points, points[torch.from_numpy(drawn).to(points.device)])
        left = np.where(left > 0, weights * np.maximum(lowest.double().cpu().numpy(), _LEAST), 0.0)
        left[drawn] = 0.0
    return np.concatenate(rounds)


def _lower_distances(nearest: Tensor, points: Tensor, codes: Tensor) -> None:
    """Lower `nearest` (n,) to the squared distance from each point (n, D) to the nearest of the codes (m, D)."""
    code_norms = codes.square().sum(dim=1)
    step = max(1, _DISTANCES_AT_ONCE // len(codes))
    for start in range(0, len(points), step):
        part = points[start : start + step]
        partial = torch.addmm(code_norms, part, codes.T, alpha=-2).amin(dim=1)
        distances = (partial + part.square().sum(dim=1)).clamp_(min=0)
        torch.minimum(nearest[start : start + step], distances, out=nearest[start : start + step])


def choose_weighted(weights: npt.NDArray[np.float64], count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Draw distinct positions, each with a probability in proportion to its weight among those that are left.

    Exponential variables divided by the weights have this distribution when they are sorted (Efraimidis and Spirakis,
    "Weighted random sampling with a reservoir", 2006).

    Args:
        weights: (n,), at least 0; a position of weight 0 is never drawn.
        count: number of positions, at most the number of positive weights.
        rng: generator; n numbers are drawn from it, independent of the weights.

    Returns:
        (count,) positions in ascending order.
    """
    arrivals = rng.standard_exponential(len(weights))
    with np.errstate(divide="ignore"):
        keys = arrivals / weights
    nearest = np.argpartition(keys, count - 1)[:count] if count else np.empty(0, np.int64)
    return np.sort(nearest).astype(np.int64)
