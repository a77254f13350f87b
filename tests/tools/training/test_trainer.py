"""Training finds the codebook that Lloyd's algorithm finds, brings dead codes back, and repeats itself bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2

from vqserve_server.errors import InvalidOption, InvalidShape, NonFiniteLatents
from vqserve_tools.latents.array import ArrayRows
from vqserve_tools.training.options import TrainingOptions
from vqserve_tools.training.trainer import Trained, train

NUM_CODES = 32


@pytest.fixture(scope="module")
def clustered() -> np.ndarray:
    """4000 rows of width 4 in 32 clusters of unequal size and width."""
    rng = np.random.default_rng(7)
    centres = rng.normal(size=(NUM_CODES, 4)) * 5
    owner = rng.choice(NUM_CODES, size=4000, p=rng.dirichlet(np.full(NUM_CODES, 3.0)))
    return (centres[owner] + rng.normal(size=(4000, 4)) * rng.uniform(0.2, 1, size=NUM_CODES)[owner, None]).astype("f4")


def run(array: np.ndarray, **options: Any) -> Trained:
    settings = {"num_codes": NUM_CODES, "batch_size": 500, "steps": 150, "decay": 0.9, "device": "cpu"} | options
    return train(ArrayRows(array), TrainingOptions(**settings))


def mean_squared_error(array: np.ndarray, codes: np.ndarray) -> float:
    distances = ((array[:, None].astype(np.float64) - codes) ** 2).sum(axis=2)
    return float(distances.min(axis=1).mean() / array.shape[1])


def lloyd(array: np.ndarray) -> float:
    """The best of three runs of scipy's k-means++ and Lloyd iterations."""
    runs = [kmeans2(array.astype(np.float64), NUM_CODES, iter=50, minit="++", rng=seed)[0] for seed in range(3)]
    return min(mean_squared_error(array, codes) for codes in runs)


@pytest.mark.parametrize("kind", ["ema", "vq"])
@pytest.mark.parametrize("initialisation", ["kmeans++", "sample"])
def test_comes_close_to_lloyd(clustered: np.ndarray, kind: str, initialisation: str) -> None:
    trained = run(clustered, kind=kind, initialisation=initialisation)
    assert trained.quantizer.kind == kind
    assert not trained.quantizer.training
    # A uniform start leaves averages in a worse local optimum, as it does Lloyd's algorithm.
    slack = 1.35 if (kind, initialisation) == ("ema", "sample") else 1.1
    assert trained.quality.mean_squared_error < slack * lloyd(clustered)
    assert trained.quality.used_codes == NUM_CODES


@pytest.mark.parametrize("kind", ["ema", "vq"])
def test_learns(clustered: np.ndarray, kind: str) -> None:
    first = run(clustered, kind=kind, steps=1, initialisation="sample")
    last = run(clustered, kind=kind, initialisation="sample", reseed_every=0)
    assert last.codes_reseeded == 0
    assert last.quality.mean_squared_error < 0.9 * first.quality.mean_squared_error


def test_quality_is_what_brute_force_says(clustered: np.ndarray) -> None:
    trained = run(clustered, steps=5)
    codes = trained.quantizer.code_rows().numpy()
    distances = ((clustered[:, None].astype(np.float64) - codes) ** 2).sum(axis=2)
    shares = np.bincount(distances.argmin(axis=1), minlength=NUM_CODES) / len(clustered)
    used = shares[shares > 0]
    assert trained.quality.mean_squared_error == pytest.approx(mean_squared_error(clustered, codes), rel=1e-5)
    assert trained.quality.perplexity == pytest.approx(np.exp(-(used * np.log(used)).sum()), rel=1e-9)
    assert trained.quality.used_codes == len(used)


@pytest.mark.parametrize("kind", ["ema", "vq"])
def test_dead_codes_come_back(clustered: np.ndarray, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # All codes but four start where no row ever goes.
    out_of_reach = 1e3 + np.arange((NUM_CODES - 4) * 4, dtype=np.float32).reshape(-1, 4)
    start = np.concatenate([clustered[:4], out_of_reach])
    monkeypatch.setattr("vqserve_tools.training.trainer.initial_codes", lambda *_, **__: start.copy())
    lazy = run(clustered, kind=kind, reseed_every=0)
    eager = run(clustered, kind=kind)
    assert (lazy.codes_reseeded, lazy.quality.used_codes) == (0, 4)
    assert eager.codes_reseeded >= NUM_CODES - 4
    assert eager.quality.used_codes == NUM_CODES
    assert eager.quality.mean_squared_error < 1.35 * lloyd(clustered)


@pytest.mark.parametrize("initialisation", ["kmeans++", "sample"])
def test_an_ema_codebook_never_jumps(clustered: np.ndarray, initialisation: str) -> None:
    # The original starts with cluster_size zero: codes that the first batch misses go to 1e5.
    for steps in (1, 2, 30):
        trained = run(clustered, steps=steps, batch_size=8, num_codes=256, decay=0.99, initialisation=initialisation)
        assert trained.quantizer.code_rows().abs().max() <= 1.001 * np.abs(clustered).max()


@pytest.mark.parametrize("kind", ["ema", "vq"])
def test_the_same_seed_gives_the_same_bits(clustered: np.ndarray, kind: str) -> None:
    before = torch.get_rng_state()
    one = run(clustered, kind=kind, steps=45).quantizer.state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    two = run(clustered, kind=kind, steps=45).quantizer.state_dict()
    other = run(clustered, kind=kind, steps=45, seed=1).quantizer.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])


def test_the_layout_does_not_matter(clustered: np.ndarray) -> None:
    grid = np.ascontiguousarray(np.moveaxis(clustered.reshape(4, 10, 100, 4), -1, 1))
    one, two = run(clustered, steps=5), run(grid, steps=5)
    assert torch.equal(one.quantizer.code_rows(), two.quantizer.code_rows())


def test_what_cannot_be_trained_on_is_rejected(clustered: np.ndarray) -> None:
    with pytest.raises(InvalidShape, match="31 rows are too few for 32 codes"):
        run(clustered[:31])
    bad = clustered.copy()
    bad[3, 2] = np.nan
    with pytest.raises(NonFiniteLatents, match=r"latents\[3, 2\] is nan"):
        run(bad)
    with pytest.raises(InvalidOption, match="device must be"):
        run(clustered, device="abacus")
    with pytest.raises(InvalidOption, match="diverged"):
        run(clustered, kind="vq", lr=1e30, steps=3)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kind": "gumbel"}, "kind must be one of ema, vq, not 'gumbel'"),
        ({"initialisation": "zero"}, "initialisation must be"),
        ({"num_codes": 0}, "num_codes must be at least 1, not 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"steps": 0}, "steps"),
        ({"epochs": 0.0}, "epochs"),
        ({"steps": 1, "epochs": 1.0}, "not both"),
        ({"seed": -1}, "seed"),
        ({"lr": float("nan")}, "lr"),
        ({"decay": 1.0}, "decay"),
        ({"beta": -1.0}, "beta"),
        ({"reseed_every": -1}, "reseed_every"),
    ],
)
def test_options_are_checked(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidOption, match=text):
        TrainingOptions(**options)


def test_sizes_follow_from_the_options() -> None:
    plan = TrainingOptions(num_codes=4096).plan(10**6)
    assert (plan.batch_size, plan.steps, plan.reseed_every) == (16384, 1000, 20)
    plan = TrainingOptions(num_codes=4096, batch_size=1000, epochs=0.5).plan(9001)
    assert (plan.batch_size, plan.steps, plan.reseed_every) == (1000, 5, 132)
    assert TrainingOptions(num_codes=10).plan(50).batch_size == 50
