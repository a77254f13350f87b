"""Callers that are silent, ping, or do not read.

gRPC ignores options that it does not know without a word: each that the server sets must be seen to work.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from support.http2 import ACK, DATA, END_STREAM, HEADERS, PING, RST_STREAM, Peer
from support.waiting import DEADLINE_S, eventually
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_server.rpc import server as server_module
from vqserve_server.rpc import transport as transport_module

FASTER = 100


@pytest.fixture
def server(fake: Callable[..., Any], serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server whose times are a hundredth of what they are."""
    options = server_module.channel_options

    def faster(*args: Any, **kwargs: Any) -> list[tuple[str, int]]:
        return [(name, value // FASTER if name.endswith("_ms") else value) for name, value in options(*args, **kwargs)]

    monkeypatch.setattr(server_module, "channel_options", faster)
    return serving(fake())


@pytest.fixture
def peer(server: Any) -> Iterator[Peer]:
    peer = Peer(server.target)
    yield peer
    peer.close()


def pinged(peer: Peer, number: int, seconds: float) -> bool:
    """Ping, read for `seconds`, and return whether the answer came."""
    is_answered = False
    peer.send(PING, struct.pack(">Q", number))
    for kind, flags, body in peer.frames(seconds):
        is_answered |= kind == PING and flags == ACK
        if kind == PING and not flags:
            peer.send(PING, body, flags=ACK)
    return is_answered


def test_a_connection_that_answers_no_ping_is_closed(peer: Peer) -> None:
    seen = []
    with pytest.raises(EOFError):
        seen.extend(iter(lambda: next(peer.frames()), None))
    # After 0.6 s of silence a ping, and 0.2 s for its answer; of itself gRPC would take hours.
    assert PING in [kind for kind, _, _ in seen]


def test_and_its_requests_are_dropped(peer: Peer, server: Any, fake: Callable[..., Any]) -> None:
    (tokenizer,) = server.app.engine.live._by_name.values()
    tokenizer.hold()
    request = pb.EncodeRequest(dtype=pb.DTYPE_FLOAT32, shape=[1, 4], latents=np.zeros(4, np.float32).tobytes())
    peer.call("EncodeStream", request.SerializeToString())
    tokenizer.wait_entered()
    eventually(lambda: server.app.engine.admission.requests == 0)
    tokenizer.release()


def test_pings_are_answered_as_often_as_is_allowed_between_calls_too(peer: Peer) -> None:
    for number in range(12):
        is_answered = pinged(peer, number, 0.15)
        while not is_answered:
            kind, flags, _ = next(peer.frames())
            is_answered = kind == PING and flags == ACK
    assert peer.farewell is None


def test_a_connection_that_pings_too_often_is_closed(peer: Peer) -> None:
    with contextlib.suppress(EOFError, ConnectionError):
        for number in range(12):
            pinged(peer, number, 0.01)
        list(peer.frames())
    assert peer.farewell == b"too_many_pings"


def test_a_reply_that_no_message_holds_is_not_sent(
    fake: Callable[..., Any], serving: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    # Replies to Encode and Decode are rejected before they are computed; a list of codebooks has no such limit.
    many = [fake(16, name=f"{number:03}-{'x' * 60}") for number in range(40)]
    client = connect(serving(*many, max_message_bytes=4096).target)
    with pytest.raises(grpc.RpcError) as caught:
        client.stub.ListCodebooks(pb.ListCodebooksRequest())
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


# 20 thousand tokens of four float32.
INDICES = pb.DecodeRequest(dtype=pb.DTYPE_UINT8, shape=[20_000], indices=bytes(20_000)).SerializeToString()
REPLY_BYTES = 320_000


@pytest.fixture
def reluctant(fake: Callable[..., Any], serving: Callable[..., Any]) -> Iterator[tuple[Any, Peer]]:
    """A server, and a caller that reads no reply before the test lets it."""
    server = serving(fake())
    peer = Peer(server.target, window=0)
    yield server, peer
    peer.close()


def wait_for_requests(server: Any, count: int) -> None:
    eventually(lambda: server.app.engine.stats.requests == count)
    threading.Event().wait(0.1)


@pytest.mark.parametrize("method", ["Decode", "DecodeStream"])
def test_a_reply_that_is_not_read_is_still_in_the_server(reluctant: Any, method: str) -> None:
    server, peer = reluctant
    peer.call(method, INDICES, end=True)
    wait_for_requests(server, 1)
    admission = server.app.engine.admission
    assert admission.bytes > REPLY_BYTES
    assert len(peer.take(REPLY_BYTES)) == REPLY_BYTES
    peer.close()
    eventually(lambda: (admission.requests, admission.rows, admission.bytes) == (0, 0, 0))


@pytest.mark.parametrize("part", ["half a request", "no reply is taken"])
def test_a_connection_that_stops_in_the_middle_is_closed(
    fake: Callable[..., Any], serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr(transport_module, "_IDLE_CHECK_S", 0.05)
    server = serving(fake(), idle_seconds=0.3)
    peer = Peer(server.target, window=0)
    if part == "half a request":
        peer.call("Decode", INDICES, said=len(INDICES) + 1)
    else:
        peer.call("Decode", INDICES, end=True)
        wait_for_requests(server, 1)
    assert any(kind in (RST_STREAM, HEADERS) and b"idle" in body for kind, _, body in peer.frames())
    # The peer sees the end before gRPC lets go of the reply.
    eventually(lambda: server.app.engine.admission.bytes == 0)
    peer.close()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_first_replies_of_a_stream_come_although_nothing_else_does(
    fake: Callable[..., Any], serving: Callable[..., Any], count: int
) -> None:
    # For a message that it may keep back gRPC writes nothing of itself, and what goes before all messages waits too.
    tokenizer = fake()
    server = serving(tokenizer)
    request = pb.EncodeRequest(dtype=pb.DTYPE_FLOAT32, shape=[1, 4], latents=bytes(16)).SerializeToString()
    first, peer = Peer(server.target), Peer(server.target)
    tokenizer.hold()
    first.call("Encode", request, end=True)
    tokenizer.wait_entered()
    # One batch.
    peer.call("EncodeStream", request)
    for _ in range(count - 1):
        peer.send(DATA, b"\0" + struct.pack(">I", len(request)) + request, stream=1)
    eventually(lambda: server.app.engine.admission.requests == 1 + count)
    # Whatever gRPC has to say of its own is said by then.
    next(peer.frames())
    list(peer.frames(0.5))
    tokenizer.release()
    got = b""
    for kind, _, body in peer.frames():
        got += body if kind == DATA else b""
        if got.count(tokenizer.info.digest.encode()) == count:
            break
    assert got.count(tokenizer.info.digest.encode()) == count
    first.close()
    peer.close()


def test_a_server_that_stops_waits_for_replies_to_be_read(reluctant: Any) -> None:
    server, peer = reluctant
    peer.call("Decode", INDICES, end=True)
    wait_for_requests(server, 1)
    stopped = asyncio.run_coroutine_threadsafe(server.app.stop(), server.loop)
    threading.Event().wait(2 * server_module._LINGER_S)
    assert len(peer.take(1 << 20)) > REPLY_BYTES
    assert stopped.result(DEADLINE_S)


def test_none_of_a_burst_of_calls_is_dropped(fake: Callable[..., Any], serving: Callable[..., Any]) -> None:
    # With a thousand calls at once gRPC itself drops some at random, with the status CANCELLED.
    request = pb.EncodeRequest(dtype=pb.DTYPE_FLOAT32, shape=[1, 4], latents=bytes(16)).SerializeToString()
    server = serving(fake())
    peers, count = [Peer(server.target) for _ in range(16)], 250
    for number in range(count):
        for peer in peers:
            peer.call("Encode", request, end=True, stream=2 * number + 1)
    for peer in peers:
        ended = 0
        for kind, flags, _ in peer.frames(240):
            assert kind != RST_STREAM
            ended += kind == HEADERS and bool(flags & END_STREAM)
            if ended == count:
                break
        assert ended == count
        peer.close()
