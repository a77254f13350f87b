"""Calls that wait for their callers: for how long the server keeps their places, and which calls do not count."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support.brute_force import nearest
from support.waiting import eventually
from vqserve_client import Client
from vqserve_server.rpc import transport

SERVICE = "vqserve.v1.TokenizerService"
IDLE_S = 0.4
LATENTS = np.zeros((3, 4), np.float32)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server looks at its calls more often than it does."""
    monkeypatch.setattr(transport, "_IDLE_CHECK_S", 0.05)


@pytest.fixture
def tokenizer(fake: Callable[..., Any]) -> Any:
    return fake()


@pytest.fixture
def server(tokenizer: Any, serving: Callable[..., Any]) -> Any:
    return serving(tokenizer, idle_seconds=IDLE_S)


@pytest.fixture
def client(server: Any, connect: Callable[..., Any]) -> Any:
    return connect(server.target)


@pytest.fixture
def leave() -> Iterator[threading.Event]:
    """What silent callers wait for."""
    event = threading.Event()
    yield event
    event.set()


def inside(server: Any) -> tuple[int, int, int]:
    admission = server.app.engine.admission
    return admission.requests, admission.rows, admission.bytes


def ending_of(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    return caught.value.code(), caught.value.details()


def silent(first: list[Any], leave: threading.Event) -> Iterator[Any]:
    yield from first
    leave.wait()


@pytest.mark.parametrize("method", ["Encode", "EncodeStream", "ListCodebooks"])
def test_a_call_without_a_message_is_ended(client: Any, leave: threading.Event, method: str) -> None:
    call = client.channel.stream_stream(f"/{SERVICE}/{method}")(silent([], leave), timeout=60)
    assert ending_of(call) == (grpc.StatusCode.UNAVAILABLE, "the call was idle for 0.4 s: make another one")


def test_a_stream_that_says_no_more_is_ended_after_its_replies(client: Any, leave: threading.Event) -> None:
    replies = client.stub.EncodeStream(silent([client.encode_request(LATENTS)] * 3, leave), timeout=60)
    assert [list(next(replies).shape) for _ in range(3)] == [[3]] * 3
    code, text = ending_of(replies)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "idle" in text


def test_replies_that_are_not_read_are_dropped(server: Any, client: Any, leave: threading.Event) -> None:
    # More than gRPC buffers for a caller that does not read.
    request = client.decode_request(np.zeros(300_000, np.uint8))
    calls = [client.stub.DecodeStream(silent([request] * 20, leave), timeout=60) for _ in range(3)]
    # Of each some reply is in the server until it is given up.
    eventually(lambda: server.app.engine.stats.requests >= len(calls))
    eventually(lambda: inside(server) == (0, 0, 0))
    for call in calls:
        assert ending_of(call)[0] is grpc.StatusCode.UNAVAILABLE
    assert client.decode(np.zeros(5, np.uint8)).shape == (5, 4)


@pytest.mark.long
def test_what_the_server_itself_is_late_with_is_not_idle(
    tokenizer: Any, serving: Callable[..., Any], connect: Callable[..., Any], leave: threading.Event
) -> None:
    client = connect(serving(tokenizer, idle_seconds=2).target)
    tokenizer.hold()
    replies = client.stub.EncodeStream(silent([client.encode_request(LATENTS)], leave), timeout=60)
    alone = client.stub.Encode.future(client.encode_request(LATENTS), timeout=60)
    tokenizer.wait_entered()
    threading.Event().wait(3)
    tokenizer.release()
    assert list(next(replies).shape) == [3]
    assert list(alone.result().shape) == [3]
    # The time that it was at work is not held against it afterwards.
    ended = threading.Event()
    replies.add_callback(ended.set)
    assert not ended.wait(1)


def test_requests_do_not_hide_a_reply_that_is_not_read(server: Any, client: Any) -> None:
    # The first reply is more than gRPC buffers for a caller that does not read; small requests still arrive.
    large, small = (client.decode_request(np.zeros(count, np.uint8)) for count in (1_000_000, 1))

    left = list(range(60))

    def requests() -> Iterator[Any]:
        yield large
        while left:
            threading.Event().wait(IDLE_S / 4)
            left.pop()
            yield small

    call = client.stub.DecodeStream(requests(), timeout=120)
    eventually(lambda: server.app.engine.stats.requests > 0)
    eventually(lambda: inside(server) == (0, 0, 0))
    assert left
    assert ending_of(call)[0] is grpc.StatusCode.UNAVAILABLE


@pytest.mark.long
def test_a_caller_that_sends_now_and_then_stays_connected(
    tokenizer: Any, serving: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    def requests() -> Iterator[Any]:
        for _ in range(10):
            threading.Event().wait(0.3)
            yield client.encode_request(LATENTS)

    client = connect(serving(tokenizer, idle_seconds=2).target)
    assert len(list(client.stub.EncodeStream(requests(), timeout=60))) == 10


def test_a_health_watcher_stays_connected(client: Any) -> None:
    watch = health_pb2_grpc.HealthStub(client.channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    ended = threading.Event()
    watch.add_callback(ended.set)
    assert not ended.wait(4 * IDLE_S)
    watch.cancel()


def test_nought_is_for_ever(fake: Callable[..., Any], serving: Callable[..., Any], connect: Callable[..., Any]) -> None:
    client, leave = connect(serving(fake(), idle_seconds=0).target), threading.Event()
    call = client.channel.stream_stream(f"/{SERVICE}/EncodeStream")(silent([], leave), timeout=60)
    ended = threading.Event()
    call.add_callback(ended.set)
    assert not ended.wait(4 * IDLE_S)
    leave.set()
    assert list(call) == []


def test_places_come_free(serving: Callable[..., Any], connect: Callable[..., Any], tokenizer: Any) -> None:
    server, leave = serving(tokenizer, idle_seconds=IDLE_S, max_concurrent_rpcs=2), threading.Event()
    client = connect(server.target)
    method = client.channel.stream_stream(f"/{SERVICE}/EncodeStream")
    calls = [method(silent([], leave), timeout=60) for _ in range(2)]
    for call in calls:
        assert ending_of(call)[0] is grpc.StatusCode.UNAVAILABLE
    # A caller sees the end of a call before its place is free.
    eventually(lambda: not server.app._rpc._service.calls._active)
    assert client.encode(LATENTS).shape == (3,)
    leave.set()


@pytest.mark.long
def test_the_sdk_does_not_notice(server: Any, tokenizer: Any) -> None:
    def slowly() -> Iterator[np.ndarray]:
        for seed in range(6):
            threading.Event().wait(3 * IDLE_S if seed % 2 else 0)
            yield np.random.default_rng(seed).standard_normal((5, 4), dtype=np.float32)

    def reader(client: Client) -> Iterator[np.ndarray]:
        for indices in client.encode_many(slowly()):
            yield indices
            threading.Event().wait(3 * IDLE_S)

    with Client(server.target) as client:
        got = list(reader(client))
    for indices, seed in zip(got, range(6), strict=True):
        latents = np.random.default_rng(seed).standard_normal((5, 4), dtype=np.float32)
        expected = nearest(latents, tokenizer.codes)
        np.testing.assert_array_equal(indices, expected)
