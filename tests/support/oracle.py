"""The true winners of many rows, by means that share nothing with the search: float64 or a k-d tree, then rationals."""

from fractions import Fraction

import numpy as np
from scipy.spatial import cKDTree

# Far more than float64 can be off, relatively to the squares that enter a score.
_NEAR = 1e-11
_CHUNK = 2048


def true_winners(rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Return the lowest index of the nearest code of every row, (n,) int64; rows and codes float32."""
    winners = np.empty(len(rows), np.int64)
    tree = cKDTree(codes.astype(np.float64)) if codes.shape[1] <= 4 else None
    for start in range(0, len(rows), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        winners[chunk] = _winners(rows[chunk], codes, tree)
    return winners


def _winners(rows: np.ndarray, codes: np.ndarray, tree: cKDTree | None) -> np.ndarray:
    wide = rows.astype(np.float64)
    if tree is not None:
        count = min(2, len(codes))
        distance, index = tree.query(wide, k=[*range(1, count + 1)], workers=2)
        winners = index[:, 0].astype(np.int64)
        reach = distance[:, 0] + _NEAR * (1 + distance[:, 0]) + _NEAR * np.abs(wide).max(axis=1)
        near = np.nonzero(distance[:, -1] <= reach)[0]
        contenders = tree.query_ball_point(wide[near], reach[near]) if near.size else []
    else:
        a = codes.astype(np.float64)
        half = 0.5 * (a * a).sum(axis=1)
        cost = half - wide @ a.T
        winners = cost.argmin(axis=1)
        room = _NEAR * (half.max() + np.sqrt((wide * wide).sum(axis=1) * 2 * half.max()))
        is_near = cost <= cost.min(axis=1, keepdims=True) + room[:, None]
        near = np.nonzero(is_near.sum(axis=1) > 1)[0]
        contenders = [np.nonzero(is_near[row])[0] for row in near]
    for row, candidates in zip(near, contenders, strict=True):
        z = [Fraction(x) for x in wide[row].tolist()]
        winners[row] = min(candidates, key=lambda j, z=z: (_cost(z, codes[j]), j))
    return winners


def _cost(z: list[Fraction], code: np.ndarray) -> Fraction:
    return sum(((x - Fraction(a)) ** 2 for x, a in zip(z, code.tolist(), strict=True)), Fraction(0))
