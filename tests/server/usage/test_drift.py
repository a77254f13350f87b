"""Drift: nothing between samples of one distribution, whatever their sizes, and more the further two are apart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqserve_server.usage.drift import LEAST_ROWS, MOST_CHANCE_BITS, MOST_NOISE_BITS, measure_drift

# Distributions of K codes by name.
SHAPES = {
    "uniform": lambda rng, k: np.full(k, 1 / k),
    "gamma": lambda rng, k: rng.gamma(1.0, size=k),
    "zipf": lambda rng, k: rng.permutation(1 / np.arange(1, k + 1)),
    "few": lambda rng, k: np.arange(k) < max(2, k // 20),
}
# An alarm should fire above this.
ALARM_BITS = 0.05


def distribution(shape, num_codes, rng):
    weights = SHAPES[shape](rng, num_codes).astype(np.float64)
    return weights / weights.sum()


def divergence(p, q):
    """Jensen-Shannon divergence in bits."""

    def entropy(shares):
        there = shares[shares > 0]
        return -(there * np.log2(there)).sum()

    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("num_codes", "rows", "reference_rows"),
    [
        (4, 1000, 1000),
        (64, 1000, 10**7),
        (1024, 1000, 10**6),
        (1024, 20_000, 5000),
        (16384, 1000, 10**6),
        (16384, 16384, 20_000),
        (16384, 10**6, 10**5),
        (262144, 2000, 10**6),
        (262144, 300_000, 10**6),
    ],
)
def test_samples_of_one_distribution_have_no_drift(shape, num_codes, rows, reference_rows):
    rng = np.random.default_rng([num_codes, rows])
    p = distribution(shape, num_codes, rng)
    repeats = 5 if num_codes > 20_000 else 20
    drifts = [measure_drift(rng.multinomial(rows, p), rng.multinomial(reference_rows, p)) for _ in range(repeats)]
    bits, noise = np.array([drift.bits for drift in drifts]), np.mean([drift.noise_bits for drift in drifts])
    # The divergence of few codes is distributed like a square: its tail is longer than that of a normal one.
    assert (bits <= 5 * noise + 2e-3).all()
    assert bits.mean() <= 2 * noise + 5e-4
    # Those that are reported never come near the alarm.
    assert all(drift.bits < ALARM_BITS for drift in drifts if drift.is_known)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    num_codes=st.integers(2, 20_000),
    rows=st.integers(LEAST_ROWS, 100_000),
    reference_rows=st.integers(LEAST_ROWS, 10**7),
    seed=st.integers(0, 1 << 30),
)
def test_no_false_alarm_for_any_sizes(shape, num_codes, rows, reference_rows, seed):
    rng = np.random.default_rng(seed)
    p = distribution(shape, num_codes, rng)
    drift = measure_drift(rng.multinomial(rows, p), rng.multinomial(reference_rows, p))
    assert drift is not None
    assert drift.bits <= 6 * drift.noise_bits + 2e-3
    if drift.is_known:
        assert drift.bits < ALARM_BITS


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    num_codes=st.integers(16, 20_000),
    rows=st.integers(LEAST_ROWS, 100_000),
    reference_rows=st.integers(LEAST_ROWS, 10**7),
    seed=st.integers(0, 1 << 30),
)
def test_another_distribution_raises_the_alarm(shape, num_codes, rows, reference_rows, seed):
    """Half of the codes are no longer used: about 0.3 bits."""
    rng = np.random.default_rng(seed)
    p = distribution(shape, num_codes, rng)
    q = p * (rng.permutation(num_codes) % 2)
    total = q.sum()
    if total == 0:
        return
    q /= total
    expected = divergence(p, q)
    drift = measure_drift(rng.multinomial(rows, q), rng.multinomial(reference_rows, p))
    assert drift is not None
    if expected > 0.2 and drift.is_known:
        assert drift.bits > 2 * ALARM_BITS
        # What chance takes off is at most MOST_CHANCE_BITS; what is left is of the right size.
        assert 0.4 * expected < drift.bits < 1.6 * expected


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_codes", [16, 1024, 16384])
def test_large_samples_give_the_divergence_itself(shape, num_codes):
    rng = np.random.default_rng(num_codes)
    p, q = distribution(shape, num_codes, rng), distribution("gamma", num_codes, rng)
    drift = measure_drift(rng.multinomial(10**7, p), rng.multinomial(3 * 10**7, q))
    assert drift.is_known
    assert drift.bits == pytest.approx(divergence(p, q), abs=0.002)


def test_samples_without_a_common_code_are_one_bit_apart():
    live, reference = np.zeros(100, np.uint32), np.zeros(100, np.int64)
    live[:50], reference[50:] = 100, 1000
    assert measure_drift(live, reference).bits == pytest.approx(1.0)


def test_it_does_not_matter_which_sample_is_which():
    rng = np.random.default_rng(0)
    live, reference = rng.poisson(3.0, 1000), rng.poisson(30.0, 1000)
    assert measure_drift(live, reference) == measure_drift(reference, live)


@pytest.mark.parametrize("num_codes", [64, 1024, 16384, 262144])
def test_it_is_known_from_about_as_many_rows_as_codes_in_use(num_codes):
    rng = np.random.default_rng(0)
    p = distribution("uniform", num_codes, rng)
    reference = rng.multinomial(100 * num_codes, p)
    assert measure_drift(rng.multinomial(max(num_codes * 11 // 10, 2000), p), reference).is_known
    too_few = num_codes // 4
    if too_few >= LEAST_ROWS:
        assert not measure_drift(rng.multinomial(too_few, p), reference).is_known


def test_codes_that_are_not_in_use_need_no_rows():
    rng = np.random.default_rng(0)
    counts = np.zeros(1 << 20, np.int64)
    counts[:100] = rng.multinomial(1000, np.full(100, 0.01))
    drift = measure_drift(counts, counts * 100)
    assert drift.is_known
    assert drift.bits == 0


def test_too_few_rows_have_no_drift():
    assert measure_drift(np.array([LEAST_ROWS - 1, 0]), np.array([10**6, 10**6])) is None
    assert measure_drift(np.array([10**6, 10**6]), np.array([LEAST_ROWS - 1, 0])) is None
    assert measure_drift(np.array([0, 0]), np.array([10**6, 0])) is None


def test_one_code_has_no_drift():
    drift = measure_drift(np.array([5000]), np.array([10**9]))
    assert (drift.bits, drift.chance_bits, drift.noise_bits) == (0.0, 0.0, 0.0)


def test_the_noise_that_is_predicted_is_the_noise_there_is():
    rng = np.random.default_rng(3)
    p = distribution("gamma", 1000, rng)
    reference = rng.multinomial(10**6, p)
    # Above zero nothing is cut off: half of the drifts.
    bits = np.array([measure_drift(rng.multinomial(3000, p), reference).bits for _ in range(300)])
    predicted = measure_drift(rng.multinomial(3000, p), reference).noise_bits
    assert np.sqrt(np.mean(bits[bits > 0] ** 2)) == pytest.approx(predicted, rel=0.25)
    assert predicted < MOST_NOISE_BITS
    assert measure_drift(rng.multinomial(3000, p), reference).chance_bits < MOST_CHANCE_BITS
