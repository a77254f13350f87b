"""Random choices that a training makes: all from one numpy generator, so that a seed fixes them on every device."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt


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


def shuffled_batches(
    num_rows: int, batch_size: int, steps: int, rng: np.random.Generator
) -> Iterator[npt.NDArray[np.int64]]:
    """Yield `steps` batches of row positions: one random permutation of all rows after the other, cut evenly.

    Positions in a batch ascend, which is kind to a mapped file.
    """
    order, start = rng.permutation(num_rows), 0
    for _ in range(steps):
        batch = order[start : start + batch_size]
        start += batch_size
        if len(batch) < batch_size:
            order, start = rng.permutation(num_rows), batch_size - len(batch)
            batch = np.concatenate([batch, order[:start]])
        yield np.sort(batch)
