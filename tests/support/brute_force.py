"""The nearest code of every row by comparing all of them in float64: right where no two codes nearly tie."""

import numpy as np


def nearest(rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Return the lowest index of the nearest code of every row: rows (..., D) and codes (K, D) give (...) int64."""
    distances = ((rows[..., None, :].astype(np.float64) - codes.astype(np.float64)) ** 2).sum(axis=-1)
    return distances.argmin(axis=-1)
