"""Sampling of live traffic: every row has the same probability, and what is counted is what was encoded."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinds import CASES, make
from vqserve_server.code_groups import CodeGroups
from vqserve_server.codebooks.statistics import StatisticsTally
from vqserve_server.quantizers import ResidualQuantizer, VectorQuantizer
from vqserve_server.tokenizer import Tokenizer
from vqserve_server.usage import live
from vqserve_server.usage.health import HealthReader
from vqserve_server.usage.live import LiveUsage, RowSampler, window_rows

NBYTES = 8 << 20


def record(usage, tokenizer, rows, indices):
    """Take all rows of a batch."""
    usage.record(tokenizer, rows, indices)


def followed(*tokenizers, one_in=1, memory=None):
    """Return a sample of these codebooks, and its memory."""
    memory = memoryview(bytearray(NBYTES)) if memory is None else memory
    usage = LiveUsage(memory, one_in=one_in, seed=0)
    usage.follow(tokenizers)
    return usage, memory


def health_of(memory):
    return {codebook.name: codebook for codebook in HealthReader([memory]).codebooks()}


def latents_of(tokenizer, rows, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((rows, tokenizer.info.input_dim)).astype(dtype)


@pytest.fixture(autouse=True)
def counted_at_once(monkeypatch):
    """Sampled rows do not wait for more."""
    monkeypatch.setattr(live, "_LONGEST_WAIT_S", -1.0)


# Which rows.


@given(sizes=st.lists(st.integers(0, 300), max_size=50), one_in=st.sampled_from([1, 2, 7, 256]))
def test_batches_make_no_difference(sizes, one_in):
    """The same rows are chosen, however the stream is cut into batches."""
    sampler, whole = (RowSampler(one_in, np.random.default_rng(1)) for _ in range(2))
    found, start = [], 0
    for size in sizes:
        chosen = sampler.choose(size)
        assert chosen == sorted(set(chosen))
        assert all(0 <= row < size for row in chosen)
        found += [start + row for row in chosen]
        start += size
    assert found == whole.choose(start)


def test_every_row_has_the_same_probability_and_none_depends_on_another():
    sampler = RowSampler(8, np.random.default_rng(2))
    batch, repeats = 64, 20_000
    counts = np.zeros(batch)
    together = np.zeros(batch)
    for _ in range(repeats):
        chosen = sampler.choose(batch)
        counts[chosen] += 1
        if 10 in chosen:
            together[chosen] += 1
    # Four standard deviations of a binomial count, at each of the 64 places.
    expected = repeats / 8
    assert np.abs(counts - expected).max() < 4.5 * np.sqrt(expected * 7 / 8)
    others = np.delete(together, 10) / counts[10]
    assert np.abs(others - 1 / 8).max() < 4.5 * np.sqrt(7 / 64 / counts[10])


def test_callers_with_large_and_small_batches_are_sampled_alike():
    """One caller's rows come 3 at a time, the other's 5000 at a time."""
    tokenizer = Tokenizer(VectorQuantizer(8, 2))
    usage, memory = followed(tokenizer, one_in=16)
    sampler = usage.sampler()

    def send(rows, code):
        chosen = sampler.choose(rows)
        if chosen:
            usage.record(tokenizer, np.zeros((len(chosen), 2), np.float32), np.full(len(chosen), code))

    for _ in range(60):
        for _ in range(1667):
            send(3, 0)
        send(5000, 1)
    window = HealthReader([memory]).codebooks()[0].stages[0]
    # 5001 and 5000 rows a round: half each, within five standard deviations of what is left in the window.
    assert window.usage[0] == pytest.approx(0.5, abs=5 * 0.5 / np.sqrt(window.sampled_rows))


# What is counted.


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_usage_and_error_of_every_kind(name, dtype):
    quantizer = make(name)
    tokenizer = Tokenizer(quantizer, name=name)
    latents = latents_of(tokenizer, 700, dtype=dtype)
    found = tokenizer.encode_rows(latents)
    tally = StatisticsTally(tokenizer.code_groups)
    indices = found.reshape(700, -1)
    tally.add(indices, None if tokenizer.errors is None else tokenizer.errors.of(latents, indices))
    expected = tally.statistics("")
    tokenizer.statistics = expected
    usage, memory = followed(tokenizer)
    for start in range(0, 700, 100):
        record(usage, tokenizer, latents[start : start + 100], found[start : start + 100])
    health = health_of(memory)[name]
    assert (health.kind, health.digest, health.sampled_rows) == (quantizer.kind, tokenizer.digest, 700)
    assert (health.error is None) == (not quantizer.is_approximate)
    if health.error is not None:
        assert health.error == pytest.approx(expected.error, rel=1e-9)
        assert health.error_ratio == pytest.approx(1.0, rel=1e-9)
    for number, (stage, part) in enumerate(zip(health.stages, tokenizer.code_groups.stages, strict=True)):
        counts = expected.usage[part]
        assert stage.sampled_rows == 700
        assert (stage.codes, stage.codes_per_group) == (tokenizer.code_groups.sizes[number], 1)
        assert (stage.used, stage.dead) == (np.count_nonzero(counts), np.count_nonzero(counts == 0))
        shares = counts[counts > 0] / counts.sum()
        assert stage.perplexity == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
        assert stage.usage == pytest.approx(counts / counts.sum(), rel=1e-5)
        assert stage.reference == pytest.approx(counts / counts.sum(), rel=1e-5)
        # Too few rows.
        assert stage.drift_bits is None


def test_requests_for_fewer_indices_count_for_their_stages_only():
    tokenizer = Tokenizer(ResidualQuantizer(3, 6, 2))
    usage, memory = followed(tokenizer)
    latents = latents_of(tokenizer, 60)
    for count in (1, 2, 3):
        found = tokenizer.encode_rows(latents[: 20 * count], num_quantizers=count)
        record(usage, tokenizer, latents[: 20 * count], found)
    health = health_of(memory)["codebook"]
    assert [stage.sampled_rows for stage in health.stages] == [120, 100, 60]
    whole = tokenizer.encode_rows(latents)
    assert health.error == pytest.approx(tokenizer.errors.of(latents, whole).mean(), rel=1e-9)


def test_rows_are_counted_many_at_once(monkeypatch):
    monkeypatch.setattr(live, "_LONGEST_WAIT_S", 3600.0)
    tokenizer = Tokenizer(VectorQuantizer(8, 2))
    usage, memory = followed(tokenizer)
    for _ in range(2050):
        record(usage, tokenizer, np.zeros((1, 2), np.float32), np.zeros(1, np.int64))
    assert health_of(memory)["codebook"].sampled_rows == 2048
    record(usage, tokenizer, np.zeros((5000, 2), np.float32), np.zeros(5000, np.int64))
    assert health_of(memory)["codebook"].sampled_rows == 7050


def test_latents_that_overflow_have_no_error():
    tokenizer = Tokenizer(VectorQuantizer(8, 2))
    usage, memory = followed(tokenizer)
    latents = np.full((10, 2), 1e200)
    record(usage, tokenizer, latents, tokenizer.encode_rows(latents))
    record(usage, tokenizer, latents[:1] * 0, np.zeros(1, np.int64))
    health = health_of(memory)["codebook"]
    assert health.sampled_rows == 11
    assert np.isfinite(health.error)


def test_the_window_forgets():
    tokenizer = Tokenizer(VectorQuantizer(8, 2))
    usage, memory = followed(tokenizer)
    full = window_rows(tokenizer.code_groups)
    rows = np.zeros((1024, 2), np.float32)

    def send(code, count):
        for _ in range(count // 1024):
            record(usage, tokenizer, rows, np.full(1024, code))
            stage = HealthReader([memory]).codebooks()[0].stages[0]
        return stage.sampled_rows, stage.usage

    assert send(0, full) == (full, [1.0, *[0.0] * 7])
    seen, shares = send(1, full)
    assert (seen, shares[:2]) == (2 * full, [0.5, 0.5])
    seen, shares = send(2, full)
    assert (seen, shares[:3]) == (2 * full, [0.0, 0.5, 0.5])
    assert HealthReader([memory]).codebooks()[0].sampled_rows == 3 * full


def test_a_window_has_several_rows_for_each_code():
    assert window_rows(CodeGroups((16,))) == 1 << 14
    assert window_rows(CodeGroups((16384, 1024))) == 1 << 16
    assert window_rows(CodeGroups((262144,))) == 1 << 20
    assert window_rows(CodeGroups((1 << 32,))) == 1 << 20


def test_threads_lose_nothing():
    tokenizer = Tokenizer(VectorQuantizer(8, 2))
    usage, memory = followed(tokenizer)
    rows, indices = np.zeros((10, 2), np.float32), np.arange(10) % 8

    def send():
        for _ in range(300):
            record(usage, tokenizer, rows, indices)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    health = health_of(memory)["codebook"]
    assert health.sampled_rows == health.stages[0].sampled_rows == 12_000


# Which codebooks.


def test_a_codebook_that_is_not_followed_is_not_sampled():
    first, second = (Tokenizer(VectorQuantizer(8, 2), name=name) for name in ("a", "b"))
    usage, memory = followed(first)
    record(usage, second, np.zeros((9, 2), np.float32), np.zeros(9, np.int64))
    assert list(health_of(memory)) == ["a"]
    usage.follow([second])
    record(usage, second, np.zeros((9, 2), np.float32), np.zeros(9, np.int64))
    record(usage, first, np.zeros((9, 2), np.float32), np.zeros(9, np.int64))
    assert {name: found.sampled_rows for name, found in health_of(memory).items()} == {"b": 9}
    usage.forget(second)
    record(usage, second, np.zeros((9, 2), np.float32), np.zeros(9, np.int64))
    assert health_of(memory)["b"].sampled_rows == 9


def test_a_swap_starts_anew_and_the_number_of_rows_goes_on():
    old, new = (Tokenizer(make("vq", seed), name="book") for seed in range(2))
    usage, memory = followed(old)
    record(usage, old, np.zeros((50, 3), np.float32), np.zeros(50, np.int64))
    usage.follow([new])
    health = health_of(memory)["book"]
    assert (health.digest, health.sampled_rows, health.stages[0].sampled_rows) == (new.digest, 50, 0)
    assert (health.error, health.stages[0].perplexity) == (None, None)
    # A batch of the old one that ends only now.
    record(usage, old, np.zeros((50, 3), np.float32), np.zeros(50, np.int64))
    record(usage, new, np.zeros((7, 3), np.float32), np.full(7, 3))
    health = health_of(memory)["book"]
    assert (health.sampled_rows, health.stages[0].sampled_rows, health.stages[0].usage[3]) == (57, 7, 1.0)


def test_other_codebooks_of_a_swap_go_on():
    kept, old, new = (Tokenizer(make("vq", seed), name=name) for seed, name in enumerate(("kept", "book", "book")))
    usage, memory = followed(kept, old)
    record(usage, kept, np.zeros((5, 3), np.float32), np.zeros(5, np.int64))
    usage.follow([new, kept])
    record(usage, kept, np.zeros((5, 3), np.float32), np.zeros(5, np.int64))
    assert health_of(memory)["kept"].stages[0].sampled_rows == 10


def test_new_statistics_of_the_same_codebook_are_compared_with():
    tokenizer = Tokenizer(make("vq"), name="book")
    usage, memory = followed(tokenizer)
    record(usage, tokenizer, np.zeros((5, 3), np.float32), np.zeros(5, np.int64))
    assert health_of(memory)["book"].stages[0].reference is None
    tally = StatisticsTally(tokenizer.code_groups)
    tally.add(np.array([[1], [1], [2], [3]]), np.full(4, 2.0))
    tokenizer.statistics = tally.statistics("four")
    usage.follow([tokenizer])
    health = health_of(memory)["book"]
    assert health.stages[0].reference[:5] == [0, 0.5, 0.25, 0.25, 0]
    assert health.error_ratio == pytest.approx(health.error / 2)
    assert health.sampled_rows == 5
    tokenizer.statistics = None
    usage.follow([tokenizer])
    assert health_of(memory)["book"].stages[0].reference is None


def test_a_process_that_comes_next_goes_on():
    tokenizer = Tokenizer(make("vq"), name="book")
    usage, memory = followed(tokenizer)
    record(usage, tokenizer, np.zeros((50, 3), np.float32), np.zeros(50, np.int64))
    again, _ = followed(tokenizer, memory=memory)
    record(again, tokenizer, np.zeros((50, 3), np.float32), np.ones(50, np.int64))
    health = health_of(memory)["book"]
    assert (health.sampled_rows, health.stages[0].usage[:2]) == (100, [0.5, 0.5])
