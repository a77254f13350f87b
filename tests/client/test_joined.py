"""Small arrays of encode_many and decode_many that go as one: their answers are those that each would get alone."""

from __future__ import annotations

import itertools
import pickle
import threading

import grpc
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vqserve_client import DigestChanged, InvalidArgument, Unavailable
from vqserve_client.pipeline import JOINED_BYTES, MOST_JOINED


def answers_of(tiny, generator, *, first):
    """Return the answers, and the failure if there was one; no request is answered before `first` have arrived."""
    tiny.gate.clear()
    answers: list = []
    failures: list = []

    def take():
        try:
            answers.extend(generator)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    for _ in range(first):
        assert tiny.arrived.acquire(timeout=60)
    tiny.gate.set()
    thread.join()
    return answers, failures


def test_what_waits_goes_as_one(tiny, connect, latents):
    items = [latents(3, 4, seed=seed) for seed in range(1 + 2 * MOST_JOINED)]
    client = connect(tiny.target, window=3)
    client.codebooks()
    answers, failures = answers_of(tiny, client.encode_many(iter(items)), first=3)
    assert not failures
    assert all((answer == tiny.codes["small"].encode(item)).all() for item, answer in zip(items, answers, strict=True))
    lengths = sorted(request.shape[0] for request in tiny.requests)
    assert lengths == [3, 3 * MOST_JOINED, 3 * MOST_JOINED]


def test_lone_and_joined_answers_own_their_memory(tiny, connect, latents):
    items = [latents(3, 4, seed=seed) for seed in range(40)]
    client = connect(tiny.target, window=2)
    client.codebooks()
    answers, _ = answers_of(tiny, client.encode_many(iter(items)), first=2)
    assert len(tiny.requests) == 2
    for answer in answers:
        assert answer.base is None
        assert answer.flags.c_contiguous
        assert answer.flags.writeable
    answers[5][:] = 0
    assert (answers[6] == tiny.codes["small"].encode(items[6])).all()
    tensors, _ = answers_of(tiny, client.encode_many(torch.from_numpy(item) for item in items), first=2)
    assert len(tiny.requests) == 4
    assert len(pickle.dumps(tensors[20])) < 1000
    assert tensors[20].untyped_storage().nbytes() == 3 * 8


def test_arrays_that_do_not_fit_together_go_apart(tiny, connect, latents):
    """Types, ranks, widths and kinds may change at any item."""
    kinds = [
        latents(3, 4),
        latents(3, 4).astype(np.float64),
        latents(2, 4, 3, 3),
        latents(2, 4, 3, 5),
        latents(0, 4),
        latents(2, 5, 4),
        torch.from_numpy(latents(3, 4)),
        torch.from_numpy(latents(3, 4)).bfloat16(),
        latents(6, 4)[::2],
    ]
    items = [kinds[i] for i in np.random.default_rng(5).integers(0, len(kinds), 300)]
    client = connect(tiny.target, window=2)
    answers, failures = answers_of(tiny, client.encode_many(iter(items)), first=1)
    assert not failures
    alone = {id(kind): client.encode(kind) for kind in kinds}
    assert len(answers) == len(items)
    for item, answer in zip(items, answers, strict=True):
        expected = alone[id(item)]
        assert type(answer) is type(expected)
        assert answer.dtype == expected.dtype
        assert answer.shape == expected.shape
        assert (answer == expected).all()


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_lengths_come_back_in_order(tiny, connect, data):
    lengths = data.draw(st.lists(st.one_of(st.integers(0, 40), st.sampled_from([5000, 20000])), max_size=40))
    window = data.draw(st.integers(1, 5))
    most = data.draw(st.sampled_from([1024, 4096, 64 << 20]))
    rng = np.random.default_rng(len(lengths))
    items = [rng.integers(0, 300, length).astype(np.uint16) for length in lengths]
    client = connect(tiny.target, window=window, max_message_bytes=most)
    tiny.requests.clear()
    decoded = list(client.decode_many(iter(items), dtype="bfloat16", output="code_rows"))
    rows = torch.from_numpy(tiny.codes["small"].rows).bfloat16().float().numpy()
    assert len(decoded) == len(items)
    assert all((answer == rows[item]).all() for item, answer in zip(items, decoded, strict=True))
    for request in tiny.requests:
        # The reply counts, which is larger here: no array joins others beyond the limit.
        assert request.shape[0] * 8 <= max(JOINED_BYTES, 8 * max(lengths))
        assert request.ByteSize() <= most
        assert request.shape[0] * 8 <= most


@pytest.mark.parametrize("position", [3, 17, 39])
def test_one_that_fails_says_where_itself(tiny, connect, position):
    """The server finds it in what was joined; the error is what it would be alone, and comes in its turn."""
    items = [np.full(3, number, np.uint16) for number in range(40)]
    items[position][1] = 9999
    client = connect(tiny.target, window=2)
    client.codebooks()

    def name_it(request, context, honest):
        indices = np.frombuffer(request.indices, np.uint16)
        if indices.max() > 300:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"indices[{indices.argmax()}] is out of range")
        return honest()

    tiny.script.extend([name_it] * 200)
    answers, failures = answers_of(tiny, client.decode_many(iter(items)), first=2)
    assert [answer[0, 0] for answer in answers] == [tiny.codes["small"].rows[n, 0] for n in range(position)]
    (failure,) = failures
    assert isinstance(failure, InvalidArgument)
    assert "indices[1] is out of range" in str(failure)


def test_a_server_that_fails_otherwise_is_not_asked_for_each(tiny, connect, failing, latents):
    items = [latents(3, 4, seed=seed) for seed in range(300)]
    client = connect(tiny.target, window=2, retries=0)
    client.codebooks()
    tiny.script.extend([lambda request, context, honest: honest()] * 2 + [failing("UNAVAILABLE")] * 100)
    answers, (failure,) = answers_of(tiny, client.encode_many(iter(items)), first=2)
    assert len(answers) == 1 + MOST_JOINED
    assert isinstance(failure, Unavailable)
    assert len(tiny.requests) <= 4


def test_a_window_of_one_is_one_array_at_a_time(tiny, connect, latents):
    taken = []

    def source():
        for number in itertools.count():
            taken.append(number)
            yield latents(2, 4)

    generator = connect(tiny.target, window=1).encode_many(source())
    for done in range(1, 6):
        next(generator)
        assert len(taken) == done
    generator.close()


def test_read_ahead_is_bounded(tiny, connect, latents):
    taken = []

    def source():
        for number in itertools.count():
            taken.append(number)
            yield latents(1, 4)

    window = 3
    generator = connect(tiny.target, window=window).encode_many(source())
    for done in range(1, 600):
        next(generator)
        assert len(taken) <= done + (window + 1) * MOST_JOINED
    generator.close()


def test_a_swap_ends_the_job(tiny, connect, latents):
    """No request is answered by another codebook, joined or alone, and nothing is asked anew one by one."""
    items = [latents(3, 4, seed=seed) for seed in range(300)]

    def swap(request, context, honest):
        tiny.replace("small", digest="e" * 64)
        return honest()

    tiny.script.extend([lambda request, context, honest: honest()] * 4 + [swap])
    client = connect(tiny.target, window=2)
    answers, (failure,) = answers_of(tiny, client.encode_many(iter(items)), first=1)
    assert isinstance(failure, DigestChanged)
    assert all((answer == tiny.codes["small"].encode(item)).all() for item, answer in zip(items, answers, strict=False))
    assert 2 <= len(answers) < len(items)
    assert len(tiny.requests) <= 8


def test_read_ahead_is_bounded_for_any_shapes(tiny, connect, latents):
    """Sizes in turns, as buckets of images have them: none joins the one before."""
    taken = []

    def source():
        for number in itertools.count():
            taken.append(number)
            yield latents(1, 4, 2 + number % 2, 2)

    window = 3
    generator = connect(tiny.target, window=window).encode_many(source())
    for done in range(1, 100):
        next(generator)
        assert len(taken) <= done + window + 2
    generator.close()


def test_an_array_without_axes_raises_after_the_results_before_it(tiny, connect, latents):
    client = connect(tiny.target)
    client.codebooks()
    generator = client.encode_many([latents(3, 4), latents(3, 4), np.zeros((), np.float32), latents(3, 4)])
    assert [len(next(generator)) for _ in range(2)] == [3, 3]
    with pytest.raises(InvalidArgument):
        next(generator)


def test_a_retry_does_not_wait_for_the_source(tiny, connect, failing, latents):
    client = connect(tiny.target)
    client.codebooks()
    tiny.script.extend([failing("UNAVAILABLE")])
    taken = []

    def source():
        for number in range(600):
            taken.append(number)
            threading.Event().wait(0.05)
            yield latents(2, 4)

    generator = client.encode_many(source())
    next(generator)
    # The delay before the retry is 0.1 s at most: far from all arrays were read.
    assert len(taken) < 400
    generator.close()
