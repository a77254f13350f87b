"""Codes start at distinct rows; k-means++ spreads them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from vqserve_server.errors import InvalidShape
from vqserve_tools.latents.array import ArrayRows
from vqserve_tools.training.initialisation import choose_weighted, initial_codes
from vqserve_tools.training.trainer import shuffled_batches

CPU = torch.device("cpu")


def codes_of(array: np.ndarray, num_codes: int, method: str, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return initial_codes(ArrayRows(array), num_codes, method, rng=rng, device=CPU, progress=False)


@pytest.mark.parametrize("method", ["kmeans++", "sample"])
def test_codes_are_distinct_rows_and_follow_the_seed(method: str) -> None:
    array = np.random.default_rng(1).integers(-3, 4, size=(5000, 3)).astype(np.float32)
    codes = codes_of(array, 300, method)
    assert codes.shape == (300, 3)
    assert codes.dtype == np.float32
    assert len(np.unique(codes, axis=0)) == 300
    assert set(map(tuple, codes)) <= set(map(tuple, array))
    np.testing.assert_array_equal(codes, codes_of(array, 300, method))
    assert not np.array_equal(codes, codes_of(array, 300, method, seed=1))


@pytest.mark.parametrize("method", ["kmeans++", "sample"])
def test_as_many_codes_as_distinct_rows_take_them_all(method: str) -> None:
    # A large offset drowns the distances in rounding: still every row is found.
    array = np.repeat(np.arange(40, dtype=np.float32)[:, None] + 1e6, 3, axis=0)
    np.testing.assert_array_equal(np.sort(codes_of(array, 40, method), axis=0), np.unique(array, axis=0))


@pytest.mark.parametrize("method", ["kmeans++", "sample"])
def test_too_few_rows_are_rejected(method: str) -> None:
    with pytest.raises(InvalidShape, match="7 rows are too few for 8 codes"):
        codes_of(np.zeros((7, 2), np.float32), 8, method)
    with pytest.raises(InvalidShape, match="20 rows with 1 distinct among them are too few for 8 codes"):
        codes_of(np.zeros((20, 2), np.float32), 8, method)


def test_kmeans_plus_plus_finds_every_far_cluster_where_a_sample_does_not() -> None:
    rng = np.random.default_rng(2)
    centres = rng.normal(size=(64, 4)) * 1000
    owner = rng.choice(64, size=20_000, p=np.r_[0.5, np.full(63, 0.5 / 63)])
    array = (centres[owner] + rng.normal(size=(20_000, 4))).astype(np.float32)
    found = {method: cdist(codes_of(array, 64, method), centres).argmin(axis=1) for method in ("kmeans++", "sample")}
    assert len(set(found["kmeans++"])) == 64
    assert len(set(found["sample"])) < 64


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_kmeans_plus_plus_works_at_any_scale(scale: float) -> None:
    array = np.random.default_rng(5).normal(size=(500, 3))
    codes = codes_of((scale * array).astype(np.float32), 100, "kmeans++")
    assert len(np.unique(codes, axis=0)) == 100


def test_weighted_choice_is_without_replacement_and_in_proportion() -> None:
    rng = np.random.default_rng(3)
    weights = np.array([0.0, 1.0, 3.0, 0.0, 6.0])
    np.testing.assert_array_equal(choose_weighted(weights, 3, rng), [1, 2, 4])
    assert choose_weighted(weights, 0, rng).shape == (0,)
    firsts = np.bincount([choose_weighted(weights, 1, rng)[0] for _ in range(4000)], minlength=5)
    np.testing.assert_allclose(firsts / 4000, weights / 10, atol=0.03)


def test_batches_show_every_row_once_a_pass() -> None:
    batches = list(shuffled_batches(10, 4, 5, np.random.default_rng(4)))
    assert [len(batch) for batch in batches] == [4] * 5
    np.testing.assert_array_equal(np.bincount(np.concatenate(batches), minlength=10), np.full(10, 2))
