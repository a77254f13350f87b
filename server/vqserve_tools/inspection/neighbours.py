"""How far every code is from its nearest other one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqserve_server.search import prepare
from vqserve_tools.progress import Progress

# Of so few codes each is compared with each.
_FEW = 256
# What may be computed, some ten seconds on two cores; where all codes would take more, some are drawn. Products of the
# searches, and elements that are prepared for one search after the other.
_MOST_PRODUCTS = 1 << 39
_MOST_ELEMENTS = 1 << 22
_ELEMENTS_PER_CHUNK = 1 << 22


def draw_codes(num_codes: int, dim: int) -> Tensor:
    """Return which codes of a codebook (K, D) are to be measured, ascending (S,): all, unless that takes too long.

    The same ones every time.
    """
    affordable = max(_FEW, min(_MOST_PRODUCTS // (num_codes * dim), _MOST_ELEMENTS // dim))
    if num_codes <= affordable:
        return torch.arange(num_codes)
    drawn = np.random.default_rng(0).choice(num_codes, affordable, replace=False, shuffle=False)
    return torch.from_numpy(np.sort(drawn))


def nearest_other(codes: Tensor, drawn: Tensor, told: Progress) -> npt.NDArray[np.float64]:
    """Return the distances from codes to their nearest other one: zero where a code has an equal.

    Found by the exact search, of which a code is to be kept from finding itself: the drawn codes search all others,
    and then each half of them the other half, each quarter the other quarter of its half, and so on.

    Args:
        codes: (K, D) float32 or float64 on the CPU, finite.
        drawn: (S,) ascending positions of the codes to measure.
        told: of the codes that are done.

    Returns:
        (S,) Euclidean, of the nearest of all K - 1 others; infinite where there is no other.
    """
    rows = codes[drawn]
    squares = torch.full((len(rows),), torch.inf, dtype=torch.float64)
    if len(rows) < len(codes):
        is_other = torch.ones(len(codes), dtype=torch.bool)
        is_other[drawn] = False
        squares = _to_nearest(rows, codes[is_other])
    return torch.minimum(squares, _among(rows, told)).sqrt().numpy()


def _among(rows: Tensor, told: Progress) -> Tensor:
    """Return the squared distance of each row (n, D) to the nearest other one (n,)."""
    if len(rows) <= _FEW:
        wide = rows.double()
        # From the differences: products would cancel.
        distances = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
        told.update(len(rows))
        return distances.amin(dim=1).square()
    half = len(rows) // 2
    left, right = rows[:half], rows[half:]
    inside = torch.cat([_among(left, told), _among(right, told)])
    across = torch.cat([_to_nearest(left, right), _to_nearest(right, left)])
    return torch.minimum(inside, across)


def _to_nearest(rows: Tensor, codes: Tensor) -> Tensor:
    """Return the squared distance (n,) float64 of each row (n, D) to the nearest of codes (K, D)."""
    winners = prepare(codes).search(rows)
    step = max(1, _ELEMENTS_PER_CHUNK // rows.shape[1])
    chunks = zip(torch.split(rows, step), torch.split(winners, step), strict=True)
    return torch.cat([(some.double() - codes[won].double()).square().sum(dim=1) for some, won in chunks])
