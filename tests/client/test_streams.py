"""encode_many and decode_many on streams: what the caller sees is what single calls would give."""

from __future__ import annotations

import os
import socket
import threading
from typing import Any

import grpc
import numpy as np
import pytest

from vqserve_client import (
    Client,
    Closed,
    DeadlineExceeded,
    InvalidArgument,
    Unavailable,
)
from vqserve_client import transport as stream_module

pytestmark = pytest.mark.usefixtures("apart")


def items_of(latents: Any, count: int, size: int = 7) -> list[np.ndarray]:
    return [latents(size, 4, seed=seed) for seed in range(count)]


def nearest(tiny: Any, item: np.ndarray) -> np.ndarray:
    return tiny.codes["small"].encode(item)


def check(tiny: Any, answers: Any, items: list[np.ndarray]) -> None:
    got = list(answers)
    assert len(got) == len(items)
    for answer, item in zip(got, items, strict=True):
        np.testing.assert_array_equal(answer, nearest(tiny, item))


def test_small_items_share_one_stream(streaming: Any, connect: Any, latents: Any) -> None:
    client = connect(streaming.target)
    items = items_of(latents, 40)
    check(streaming, client.encode_many(iter(items)), items)
    assert (streaming.streams, streaming.singles) == (1, 0)
    indices = [np.array([i, 299 - i], np.uint16) for i in range(20)]
    for answer, ids in zip(client.decode_many(indices), indices, strict=True):
        np.testing.assert_array_equal(answer, streaming.codes["small"].decode(ids.astype(int)))
    assert (streaming.streams, streaming.singles) == (2, 0)


def test_large_items_go_as_calls_of_their_own_and_keep_their_place(
    streaming: Any, connect: Any, latents: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "LARGEST_STREAMED_BYTES", 2000)
    items = [latents(300 if seed % 3 == 0 else 5, 4, seed=seed) for seed in range(12)]
    check(streaming, connect(streaming.target).encode_many(items), items)
    assert (streaming.streams, streaming.singles) == (1, 4)


def test_a_single_array_is_no_stream(streaming: Any, connect: Any, latents: Any) -> None:
    connect(streaming.target).encode(latents(5, 4))
    assert (streaming.streams, streaming.singles) == (0, 1)


def test_a_server_without_streams_gets_calls(tiny: Any, connect: Any, latents: Any) -> None:
    client = connect(tiny.target)
    items = items_of(latents, 12)
    check(tiny, client.encode_many(items), items)
    check(tiny, client.encode_many(items), items)
    assert len(tiny.requests) == 24


def test_a_failed_item_raises_after_earlier_results(streaming: Any, connect: Any, failing: Any, latents: Any) -> None:
    client = connect(streaming.target)
    honest = lambda request, context, honest: honest()  # noqa: E731
    streaming.script.extend([honest] * 3 + [failing("INVALID_ARGUMENT", "bad item", vqserve_request_id="x-1")])
    items = items_of(latents, 10)
    answers = client.encode_many(items)
    for item in items[:3]:
        np.testing.assert_array_equal(next(answers), nearest(streaming, item))
    with pytest.raises(InvalidArgument, match="bad item") as caught:
        next(answers)
    assert caught.value.request_id == "x-1"
    with pytest.raises(StopIteration):
        next(answers)


@pytest.mark.parametrize("code", ["UNAVAILABLE", "RESOURCE_EXHAUSTED"])
def test_a_stream_that_breaks_is_continued_on_another(
    streaming: Any, connect: Any, failing: Any, latents: Any, code: str
) -> None:
    honest = lambda request, context, honest: honest()  # noqa: E731
    streaming.script.extend([honest] * 5 + [failing(code, "not now", vqserve_retry_after_ms="10")])
    items = items_of(latents, 20)
    check(streaming, connect(streaming.target).encode_many(items), items)
    assert streaming.streams == 2
    assert streaming.singles == 0


def test_a_failure_counts_for_its_own_request_only(streaming: Any, connect: Any, failing: Any, latents: Any) -> None:
    # Each of three requests fails once and waits; those behind it on the stream go out again before it does.
    streaming.script.extend([failing("RESOURCE_EXHAUSTED", "full", vqserve_retry_after_ms="500")] * 3)
    items = items_of(latents, 8)
    check(streaming, connect(streaming.target, retries=1).encode_many(items), items)


def test_retries_on_streams_end(streaming: Any, connect: Any, failing: Any, latents: Any) -> None:
    streaming.script.extend([failing("UNAVAILABLE", "never")] * 50)
    with pytest.raises(Unavailable, match="never"):
        list(connect(streaming.target, retries=1).encode_many(items_of(latents, 3)))


def test_a_stream_that_hangs_meets_the_items_deadline(streaming: Any, connect: Any, latents: Any) -> None:
    client = connect(streaming.target)
    client.codebooks()
    streaming.gate.clear()
    with pytest.raises(DeadlineExceeded, match="did not answer in time"):
        next(client.encode_many(items_of(latents, 3), timeout=1))


def test_leaving_early_cancels_the_stream(streaming: Any, connect: Any, latents: Any) -> None:
    client = connect(streaming.target)
    items = items_of(latents, 8)
    answers = client.encode_many(items)
    next(answers)
    streaming.gate.clear()
    answers.close()
    streaming.gate.set()
    check(streaming, client.encode_many(items), items)


def test_a_stream_with_an_unrequested_reply_is_dropped(streaming: Any, connect: Any, latents: Any) -> None:
    streaming.script.append(lambda request, context, honest: [honest(), honest(), honest()])
    items = items_of(latents, 6)
    answers = connect(streaming.target, window=1).encode_many(items)
    got = [next(answers)]
    assert streaming.cancelled.acquire(timeout=60)
    check(streaming, [*got, *answers], items)
    assert streaming.streams == 2


def test_closing_the_client_under_a_stream(streaming: Any, latents: Any) -> None:
    client = Client(streaming.target)
    answers = client.encode_many(items_of(latents, 8))
    next(answers)
    streaming.gate.clear()
    threading.Timer(0.2, client.close).start()
    with pytest.raises(Closed):
        list(answers)


@pytest.mark.skipif(
    tuple(map(int, grpc.__version__.split(".")[:2])) < (1, 78),
    reason="before 1.78 gRPC hangs or crashes in a process that is forked while a stream is open",
)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_between_answers(streaming: Any, latents: Any) -> None:
    items = items_of(latents, 12)
    with Client(streaming.target) as client:
        answers = client.encode_many(items)
        got = [next(answers) for _ in range(3)]
        child = os.fork()
        if not child:
            try:
                np.testing.assert_array_equal(client.encode(items[0]), nearest(streaming, items[0]))
            except BaseException:
                os._exit(1)
            os._exit(0)
        got += list(answers)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    check(streaming, got, items)
    # The stream ended for the fork, and another took its place.
    assert streaming.streams == 2


def test_many_generators_have_streams_of_their_own(streaming: Any, latents: Any) -> None:
    items = items_of(latents, 30)
    with Client(streaming.target) as client:
        generators = [client.encode_many(items) for _ in range(3)]
        for answers in zip(*generators, strict=True):
            np.testing.assert_array_equal(answers[0], answers[1])
            np.testing.assert_array_equal(answers[0], answers[2])
    assert streaming.streams == 3


def test_a_stream_that_fails_at_once_is_a_failed_attempt(streaming: Any, latents: Any, monkeypatch: Any) -> None:
    """If no server listens any more, a stream may end before its first request is written; it is not replaced."""
    made = []
    plain = stream_module._Stream.__init__

    def note(self: Any, *args: Any) -> None:
        made.append(self)
        plain(self, *args)
        # As late as a thread that is not its turn: whatever the call has to say, it has said.
        threading.Event().wait(0.05)

    monkeypatch.setattr(stream_module._Stream, "__init__", note)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with Client(streaming.target) as known, Client(f"127.0.0.1:{port}", retries=2, timeout=60) as client:
        known.codebooks()
        client._core._catalogue = known._core._catalogue
        with pytest.raises(Unavailable):
            list(client.encode_many(items_of(latents, 1)))
    assert len(made) == 3
