"""Codebooks replaced under load: a request gets what was live when it came, and replaced codebooks are freed."""

from __future__ import annotations

import gc
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support.brute_force import nearest
from support.waiting import eventually
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_server.rpc.headers import HeaderCache

LATENTS = np.random.default_rng(0).standard_normal((5, 4), dtype=np.float32)


def swap(server: Any, *tokenizers: Any) -> None:
    async def on_the_loop() -> None:
        server.app.swap(tokenizers)

    server.call(on_the_loop())


def check(reply: Any, tokenizer: Any, latents: np.ndarray = LATENTS) -> None:
    assert reply.digest == tokenizer.info.digest
    assert (np.frombuffer(reply.indices, np.uint8) == nearest(latents, tokenizer.codes)).all()


@pytest.fixture
def pair(fake: Callable[..., Any], serving: Callable[..., Any], connect: Callable[..., Any]) -> Any:
    """Two codebooks of one name, a server of the first, and its client."""
    first, second = fake(16), fake(17)
    server = serving(first)
    return first, second, server, connect(server.target)


def test_the_same_bytes_get_the_new_codebook_at_once(pair: Any) -> None:
    first, second, server, client = pair
    request = client.encode_request(LATENTS, codebook="fake")
    for tokenizer in (first, second, first, second):
        swap(server, tokenizer)
        for _ in range(3):
            check(client.stub.Encode(request), tokenizer)
        indices = np.arange(5, dtype=np.uint8)
        np.testing.assert_array_equal(client.decode(indices), tokenizer.codes[:5])


def test_requests_inside_finish_on_their_own_codebook(pair: Any) -> None:
    first, second, server, client = pair
    request = client.encode_request(LATENTS)
    first.hold()
    inside = client.stub.Encode.future(request)
    first.wait_entered()
    # This one waits in the queue: the device is at work.
    waiting = client.stub.Encode.future(request)
    eventually(lambda: server.app.engine.admission.requests == 2)
    swap(server, second)
    after = client.stub.Encode.future(request)
    eventually(lambda: server.app.engine.admission.requests == 3)
    first.release()
    check(inside.result(), first)
    check(waiting.result(), first)
    check(after.result(), second)


def test_a_head_read_before_a_swap_is_not_kept_for_after_it(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, server, client = pair
    reading, swapped = threading.Event(), threading.Event()
    plain = HeaderCache._parse

    def slow(self: Any, *args: Any) -> Any:
        found = plain(self, *args)
        if not reading.is_set():
            reading.set()
            swapped.wait()
        return found

    monkeypatch.setattr(HeaderCache, "_parse", slow)
    # So large that it is read on a thread, while the loop swaps.
    latents = np.tile(LATENTS, (40_000, 1))
    request = client.encode_request(latents)
    call = client.stub.Encode.future(request)
    reading.wait()
    swap(server, second)
    swapped.set()
    assert call.result().digest == first.info.digest
    assert client.stub.Encode(request).digest == second.info.digest


def test_a_stream_gets_what_is_live_request_by_request(pair: Any) -> None:
    first, second, server, client = pair
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    replies = client.stub.EncodeStream(iter(requests.get, None))
    requests.put(client.encode_request(LATENTS))
    check(next(replies), first)
    swap(server, second)
    requests.put(client.encode_request(LATENTS))
    check(next(replies), second)
    requests.put(client.encode_request(LATENTS, expected_digest=second.info.digest))
    check(next(replies), second)
    swap(server, first)
    requests.put(client.encode_request(LATENTS, expected_digest=second.info.digest))
    with pytest.raises(grpc.RpcError) as caught:
        next(replies)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    requests.put(None)


def test_a_codebook_that_is_no_longer_served(pair: Any) -> None:
    first, second, server, client = pair
    request = client.encode_request(LATENTS, codebook="fake")
    check(client.stub.Encode(request), first)
    swap(server)
    with pytest.raises(grpc.RpcError) as caught:
        client.stub.Encode(request)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert caught.value.details() == "no codebook is served"
    assert not client.stub.ListCodebooks(pb.ListCodebooksRequest()).codebooks
    swap(server, second)
    check(client.stub.Encode(request), second)


def test_a_version_by_its_number_stays_while_the_latest_changes(
    fake: Callable[..., Any], serving: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    one, two, three = (fake(16 + n, name=f"book@{n}") for n in (1, 2, 3))
    server = serving(one, two)
    client = connect(server.target)
    latest, given = client.encode_request(LATENTS, codebook="book"), client.encode_request(LATENTS, codebook="book@2")
    check(client.stub.Encode(latest), two)
    check(client.stub.Encode(given), two)
    swap(server, two, three)
    check(client.stub.Encode(latest), three)
    check(client.stub.Encode(given), two)
    listed = client.stub.ListCodebooks(pb.ListCodebooksRequest()).codebooks
    assert [book.name for book in listed] == ["book", "book@2", "book@3"]
    with pytest.raises(grpc.RpcError, match="no codebook 'book@1' is served, only: book, book@2, book@3"):
        client.encode(LATENTS, codebook="book@1")


def test_the_health_does_not_flicker(pair: Any) -> None:
    first, second, server, client = pair
    health = health_pb2_grpc.HealthStub(client.channel)
    watch = health.Watch(health_pb2.HealthCheckRequest())
    seen: list[int] = []

    def look(replies: Iterator[Any]) -> None:
        seen.extend(reply.status for reply in replies)

    thread = threading.Thread(target=look, args=(watch,))
    thread.start()
    for tokenizer in (second, first, second):
        swap(server, tokenizer)
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
    server.stop()
    thread.join()
    assert seen == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]


def test_nothing_holds_a_codebook_that_was_replaced(pair: Any) -> None:
    first, second, server, client = pair
    passing = type(first)(first.codes)
    swap(server, passing)
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    replies = client.stub.EncodeStream(iter(requests.get, None))
    requests.put(client.encode_request(LATENTS))
    check(next(replies), passing)
    for _ in range(3):
        check(client.stub.Encode(client.encode_request(LATENTS)), passing)
        client.decode(np.arange(5, dtype=np.uint8))
    gone = weakref.ref(passing)
    swap(server, second)
    del passing

    def is_gone() -> bool:
        # What refers to itself in circles may wait for the collector.
        gc.collect()
        return gone() is None

    # The device is idle, or about to be; the stream is still open.
    eventually(is_gone)
    requests.put(None)
