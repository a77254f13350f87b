"""Every backend on many rows: 10^5 by default, as many as `--search-rows` says otherwise."""

import numpy as np
import pytest
import torch

from support.oracle import true_winners
from vqserve_server.search import available, prepare

# K, D and the share of the rows: dear shapes get fewer.
SHAPES = [
    (16, 4, 30),
    (8192, 3, 20),
    (16384, 4, 16),
    (4096, 2, 10),
    (512, 8, 8),
    (16384, 8, 1),
    (256, 64, 6),
    (1024, 64, 2),
    (1024, 128, 1),
    (128, 256, 4),
    (1024, 256, 1),
    (16384, 256, 0.02),
]
KINDS = ("random", "near", "clustered", "ties", "lattice")
BACKENDS = [name for name in available("cpu") if name != "reference"]


def make(kind: str, k: int, d: int, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and codes of a kind, float32."""
    codes = rng.standard_normal((k, d), dtype=np.float32)
    if kind == "clustered":
        codes *= np.exp(rng.standard_normal((k, 1)) * 2).astype(np.float32)
    if kind == "lattice":
        # Quarter steps: sums are exact, equal distances common, codes repeated.
        codes = np.round(codes * 2) / 2
        return (np.round(rng.standard_normal((count, d)) * 4) / 4).astype(np.float32), codes
    if kind == "random":
        return rng.standard_normal((count, d), dtype=np.float32), codes
    base = codes[rng.integers(0, k, count)]
    if kind != "ties":
        return base + rng.standard_normal((count, d), dtype=np.float32) * np.float32(0.05), codes
    # Midpoints of neighbours (in one component, so that no third code is much nearer), moved by -2 to 2 ulp.
    order = np.argsort(codes[:, 0])
    place = rng.integers(0, k - 1, count)
    rows = ((codes[order[place]].astype(np.float64) + codes[order[place + 1]]) / 2).astype(np.float32)
    steps = rng.integers(-2, 3, rows.shape)
    for _ in range(2):
        rows = np.where(steps == 0, rows, np.nextafter(rows, np.where(steps > 0, np.inf, -np.inf).astype(np.float32)))
        steps -= np.sign(steps)
    return rows, codes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "d", "share"), SHAPES)
def test_no_row_is_wrong_and_none_depends_on_its_batch(pytestconfig, k, d, share, kind):
    total = pytestconfig.getoption("--search-rows")
    count = max(8, int(total * share / sum(part for *_, part in SHAPES) / len(KINDS) / len(BACKENDS)))
    rng = np.random.default_rng(k * d + len(kind))
    rows, codes = make(kind, k, d, count, rng)
    expected = true_winners(rows, codes)
    for backend in BACKENDS:
        searcher = prepare(torch.from_numpy(codes), backend=backend)
        got = searcher.search(torch.from_numpy(rows)).numpy()
        assert np.array_equal(got, expected), (backend, np.nonzero(got != expected)[0][:5])
        shuffled = rng.permutation(count)
        cuts = np.unique(rng.integers(0, count, 5))
        parts = [searcher.search(torch.from_numpy(rows[part])).numpy() for part in np.split(shuffled, cuts)]
        assert np.array_equal(np.concatenate(parts), expected[shuffled]), backend
