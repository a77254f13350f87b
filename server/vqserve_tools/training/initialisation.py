"""The codes that a training starts from: distinct rows of the latents.

Draws of points that spread over a set take each point in proportion to its squared distance from what is there already:
Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", 2007; several points a round once there are
many, as Bahmani et al. do in "Scalable k-means++", 2012.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqserve_server.errors import InvalidShape
from vqserve_tools.latent_file import LatentRows
from vqserve_tools.progress import progress_of

# So many rows for each code are looked at: more cost time and hardly change where the codes lie.
_SAMPLES_PER_CODE = 16
_LEAST_SAMPLES = 1 << 15
# The first points are drawn one by one. Later a round draws one for each 64 there are, and its distances are one matrix
# product: so few seldom fall into one gap, and those that do are moved by re-seeding.
_DRAWN_SINGLY = 512
_ROUND_SHARE = 64
_DISTANCES_AT_ONCE = 1 << 24
# Points that rounding puts at distance 0 are still distinct: they stay in the draw, behind all others.
_LEAST = np.finfo(np.float64).tiny ** 0.5
# What is farther than this, in units of the set's own extent, is as good as nowhere.
_FAR = 1e30


def initial_codes(
    rows: LatentRows, num_codes: int, method: str, *, rng: np.random.Generator, device: torch.device, progress: bool
) -> npt.NDArray[np.float32]:
    """Return `num_codes` distinct rows, (K, D) float32.

    Args:
        rows: the latents, finite.
        num_codes: K.
        method: "sample" (uniform over the rows) or "kmeans++" (each next row in proportion to its squared distance
            from the nearest one chosen so far).
        rng: fixes the choice.
        device: computes the distances.
        progress: tell on stderr how far it is.

    Raises:
        InvalidShape: fewer rows, or fewer distinct rows, than codes.
    """
    if len(rows) < num_codes:
        raise InvalidShape(f"{len(rows)} rows are too few for {num_codes} codes")
    samples = min(len(rows), max(_SAMPLES_PER_CODE * num_codes, _LEAST_SAMPLES))
    drawn = rows.take(np.sort(rng.choice(len(rows), samples, replace=False, shuffle=False)))
    candidates, counts = np.unique(drawn, axis=0, return_counts=True)
    if len(candidates) < num_codes:
        raise InvalidShape(
            f"{samples} rows with {len(candidates)} distinct among them are too few for {num_codes} codes"
        )
    weights = counts.astype(np.float64)
    if method == "sample":
        return candidates[choose_weighted(weights, num_codes, rng)]
    with progress_of("k-means++", num_codes, "code", shown=progress) as told:
        points = torch.from_numpy(candidates).to(device)
        return candidates[draw_spread(points, weights, num_codes, rng=rng, on_round=told.update)]


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
        weights: (n,) how often each point is there; one of weight 0 is never drawn.
        count: how many, at most the number of positive weights.
        rng: fixes the choice.
        nearest: (n,) squared distance to what is there already; None: nothing is, and the first is drawn by weight.
        on_round: called with the number of points drawn in each round.

    Returns:
        (count,) positions in the order drawn.
    """
    # Centred, the expansion |x|^2 - 2 x.c + |c|^2 loses least; scaled, it does not overflow.
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
    """Draw distinct positions, each draw in proportion to the weights that are left.

    The smallest of exponential variables divided by their weights fall out in just that order (Efraimidis and
    Spirakis, "Weighted random sampling with a reservoir", 2006).

    Args:
        weights: (n,), at least 0; a position of weight 0 is never drawn.
        count: how many, at most the number of positive weights.
        rng: drawn from n times, whatever the weights.

    Returns:
        (count,) positions in ascending order.
    """
    arrivals = rng.standard_exponential(len(weights))
    with np.errstate(divide="ignore"):
        keys = arrivals / weights
    nearest = np.argpartition(keys, count - 1)[:count] if count else np.empty(0, np.int64)
    return np.sort(nearest).astype(np.int64)
