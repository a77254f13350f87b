"""Callers that are silent, ping, or do not read: bare sockets that speak just enough HTTP/2.

gRPC ignores options that it does not know without a word: each that the server sets must be seen to work.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from support.waiting import DEADLINE_S, eventually
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_server.rpc import server as server_module
from vqserve_server.rpc import transport as transport_module

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
ACK, END_STREAM, END_HEADERS = 1, 1, 4
INITIAL_WINDOW_SIZE = 4
MAX_FRAME = 1 << 14
FASTER = 100


class Peer:
    """One HTTP/2 connection, frame by frame; `window`: bytes of a reply that the server may send of itself."""

    def __init__(self, target: str, *, window: int = 65535) -> None:
        host, _, port = target.rpartition(":")
        self._socket = socket.create_connection((host, int(port)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._unread = b""
        self.farewell: bytes | None = None  # the server's reason for closing
        self._socket.sendall(PREFACE)
        self.send(SETTINGS, struct.pack(">HI", INITIAL_WINDOW_SIZE, window))
        self.send(SETTINGS, flags=ACK)

    def send(self, kind: int, body: bytes = b"", *, flags: int = 0, stream: int = 0) -> None:
        """Send a frame."""
        self._socket.sendall(struct.pack(">I", len(body))[1:] + struct.pack(">BBI", kind, flags, stream) + body)

    def frames(self, seconds: float = DEADLINE_S) -> Iterator[tuple[int, int, bytes]]:
        """Yield the kind, flags and body of the frames that come within `seconds`.

        Raises:
            EOFError: the server has closed the connection.
        """
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            length = int.from_bytes(self._unread[:3], "big")
            if len(self._unread) >= 9 + length:
                frame, self._unread = self._unread[: 9 + length], self._unread[9 + length :]
                if frame[3] == GOAWAY:
                    self.farewell = frame[17:]
                yield frame[3], frame[4], frame[9:]
                continue
            self._socket.settimeout(left)
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                return
            if not data:
                raise EOFError
            self._unread += data

    def call(self, method: str, request: bytes, *, end: bool = False, stream: int = 1, said: int | None = None) -> None:
        """Begin a call and send a request; its length prefix can claim more bytes (`said`)."""
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": f"/vqserve.v1.TokenizerService/{method}",
            ":authority": "test",
            "content-type": "application/grpc",
            "te": "trailers",
        }
        # Literals that are no part of any table (RFC 7541, 6.2.2), their lengths below 127.
        block = b"".join(
            b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
            for name, value in fields.items()
        )
        self.send(HEADERS, block, flags=END_HEADERS, stream=stream)
        message = b"\0" + struct.pack(">I", len(request) if said is None else said) + request
        for start in range(0, len(message), MAX_FRAME):
            is_last = end and start + MAX_FRAME >= len(message)
            self.send(DATA, message[start : start + MAX_FRAME], flags=END_STREAM * is_last, stream=stream)

    def take(self, nbytes: int) -> bytes:
        """Let the server send `nbytes` of the reply, and return them."""
        for stream in (0, 1):
            self.send(WINDOW_UPDATE, struct.pack(">I", nbytes), stream=stream)
        got = b""
        with contextlib.suppress(EOFError):
            for kind, _, body in self.frames():
                got += body if kind == DATA else b""
                if len(got) >= nbytes:
                    break
        return got

    def close(self) -> None:
        self._socket.close()


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
    count = 4000
    peer = Peer(serving(fake()).target)
    peer.send(WINDOW_UPDATE, struct.pack(">I", 1 << 30))
    burst = threading.Thread(
        target=lambda: [peer.call("Encode", request, end=True, stream=2 * number + 1) for number in range(count)]
    )
    burst.start()
    ended = 0
    for kind, flags, _ in peer.frames(240):
        assert kind != RST_STREAM
        ended += kind == HEADERS and bool(flags & END_STREAM)
        if ended == count:
            break
    burst.join()
    peer.close()
    assert ended == count
