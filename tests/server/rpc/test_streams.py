"""EncodeStream and DecodeStream: order, errors in their place, flow control, and how streams end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import grpc
import numpy as np
import pytest

from support.brute_force import nearest
from support.waiting import eventually
from vqserve import payload
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_server.errors import Draining, Overloaded
from vqserve_server.metrics.recorder import Metrics
from vqserve_server.rpc import stream as stream_module
from vqserve_server.rpc.request import Rejection


@pytest.fixture
def tokenizer(fake: Callable[..., Any]) -> Any:
    return fake()


@pytest.fixture
def server(tokenizer: Any, serving: Callable[..., Any]) -> Any:
    return serving(tokenizer)


@pytest.fixture
def client(server: Any, connect: Callable[..., Any]) -> Any:
    return connect(server.target)


def inside(server: Any) -> tuple[int, int, int]:
    """Requests, rows and bytes that the server has admitted."""
    admission = server.app.engine.admission
    return admission.requests, admission.rows, admission.bytes


def stop_in_background(server: Any) -> Future[bool]:
    """Stop the server as SIGTERM would; resolved when it has stopped."""
    return asyncio.run_coroutine_threadsafe(server.app.stop(), server.loop)


def latents_of(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(count)
    return [rng.standard_normal((int(rng.integers(1, 9)), 4), dtype=np.float32) for _ in range(count)]


def status_of(replies: Iterator[Any]) -> tuple[list[Any], grpc.RpcError]:
    """The replies before a stream failed, and how."""
    got = []
    with pytest.raises(grpc.RpcError) as caught:
        got.extend(iter(lambda: next(replies), None))
    return got, caught.value


def test_replies_come_in_the_order_of_the_requests(client: Any, tokenizer: Any) -> None:
    sent = latents_of(60)
    replies = list(client.stub.EncodeStream(client.encode_request(latents) for latents in sent))
    assert len(replies) == len(sent)
    for latents, reply in zip(sent, replies, strict=True):
        got = payload.from_bytes(reply.indices, reply.dtype, reply.shape)
        np.testing.assert_array_equal(got, nearest(latents, tokenizer.codes))
        assert reply.digest == tokenizer.info.digest
        assert reply.stats.batch_rows >= len(latents)


def test_decoding_too(client: Any, tokenizer: Any) -> None:
    sent = [np.array([i, 15 - i], np.uint8) for i in range(16)]
    replies = client.stub.DecodeStream(client.decode_request(indices) for indices in sent)
    for indices, reply in zip(sent, replies, strict=True):
        got = payload.from_bytes(reply.latents, reply.dtype, reply.shape)
        np.testing.assert_array_equal(got, tokenizer.codes[indices])


def test_an_empty_stream_and_an_empty_request(client: Any) -> None:
    assert list(client.stub.EncodeStream(iter(()))) == []
    (reply,) = client.stub.EncodeStream(iter([client.encode_request(np.zeros((0, 4), np.float32))]))
    assert list(reply.shape) == [0]


def test_codebooks_may_differ_within_a_stream(
    fake: Callable[..., Any], serving: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    one, two = fake(16, name="one"), fake(17, name="two")
    client = connect(serving(one, two).target)
    names = ["one", "two", "two", "one"] * 3
    latents = latents_of(1)[0]
    replies = client.stub.EncodeStream(client.encode_request(latents, codebook=name) for name in names)
    assert [reply.digest for reply in replies] == [{"one": one, "two": two}[name].info.digest for name in names]


@pytest.mark.parametrize("place", [0, 1, 7])
def test_a_bad_request_ends_the_stream_after_earlier_replies(client: Any, tokenizer: Any, place: int) -> None:
    good = latents_of(10)
    requests = [client.encode_request(latents) for latents in good]
    requests[place] = client.encode_request(np.full((2, 4), np.nan, np.float32))
    replies, error = status_of(client.stub.EncodeStream(iter(requests)))
    assert len(replies) == place
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "latents[0, 0] is nan" in error.details()
    assert "vqserve-request-id" in dict(error.trailing_metadata())
    # The server goes on, and nothing of the stream is left in it.
    assert client.encode(good[0]).shape == good[0].shape[:1]


def test_a_request_that_is_no_message_ends_the_stream(client: Any) -> None:
    call = client.channel.stream_stream("/vqserve.v1.TokenizerService/EncodeStream")
    _, error = status_of(call(iter([b"\xff\xff\xff"])))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_failure_on_the_device_comes_after_earlier_replies(client: Any, tokenizer: Any) -> None:
    tokenizer.codes[3] = 1e6
    requests = [client.decode_request(np.array([i], np.uint8), latent_dtype=pb.DTYPE_FLOAT16) for i in range(6)]
    replies, error = status_of(client.stub.DecodeStream(iter(requests)))
    assert len(replies) == 3
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "beyond the range of float16: use a wider dtype" in error.details()


def test_a_stream_reads_no_further_than_its_window(
    server: Any, client: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = client.encode_request(np.zeros((100, 4), np.float32))
    size = len(request.SerializeToString()) + 100
    monkeypatch.setattr(stream_module, "WINDOW_BYTES", 5 * size - 1)
    tokenizer.hold()
    replies = client.stub.EncodeStream(iter([request] * 40))
    tokenizer.wait_entered()
    eventually(lambda: inside(server)[0] == 5)
    # It stays so: what gRPC's own flow control lets the client send meanwhile is not in the engine.
    threading.Event().wait(0.2)
    assert inside(server)[0] == 5
    tokenizer.release()
    assert len(list(replies)) == 40
    eventually(lambda: inside(server) == (0, 0, 0))


def test_a_stream_of_small_requests_leaves_capacity_for_others(server: Any, client: Any, tokenizer: Any) -> None:
    tokenizer.hold()
    replies = client.stub.EncodeStream(client.encode_request(np.zeros((1, 4), np.float32)) for _ in range(2000))
    eventually(lambda: inside(server)[0] == stream_module.WINDOW_REQUESTS)
    threading.Event().wait(0.2)
    assert inside(server)[0] == stream_module.WINDOW_REQUESTS
    tokenizer.release()
    assert len(list(replies)) == 2000
    eventually(lambda: inside(server) == (0, 0, 0))


@pytest.mark.parametrize("room", [1, 3])
def test_a_full_server_makes_a_stream_wait_for_itself(
    fake: Callable[..., Any], serving: Callable[..., Any], connect: Callable[..., Any], room: int
) -> None:
    client = connect(serving(fake(), max_queue_requests=room).target)
    replies = client.stub.EncodeStream(client.encode_request(latents) for latents in latents_of(50))
    assert len(list(replies)) == 50


def test_requests_of_a_disconnected_caller_are_dropped(server: Any, client: Any, tokenizer: Any) -> None:
    tokenizer.hold()
    call = client.stub.EncodeStream(client.encode_request(latents) for latents in latents_of(8))
    tokenizer.wait_entered()
    call.cancel()
    tokenizer.release()
    assert client.encode(np.zeros((1, 4), np.float32)).shape == (1,)
    eventually(lambda: inside(server) == (0, 0, 0))


def test_the_deadline_of_a_stream_is_that_of_its_requests(client: Any, tokenizer: Any) -> None:
    tokenizer.hold()
    replies = client.stub.EncodeStream(iter([client.encode_request(np.zeros((1, 4), np.float32))]), timeout=0.3)
    _, error = status_of(replies)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    tokenizer.release()


def test_a_server_that_stops_answers_what_it_has_read(server: Any, client: Any, tokenizer: Any) -> None:
    go_on = threading.Event()

    def requests() -> Iterator[Any]:
        for _ in range(3):
            yield client.encode_request(np.zeros((1, 4), np.float32))
        go_on.wait()

    tokenizer.hold()
    replies = client.stub.EncodeStream(requests())
    tokenizer.wait_entered()
    eventually(lambda: inside(server)[0] == 3)
    stopped = stop_in_background(server)
    tokenizer.release()
    got, error = status_of(replies)
    go_on.set()
    assert len(got) == 3
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert stopped.result()


def test_an_idle_stream_does_not_hold_up_a_stop(server: Any, client: Any) -> None:
    go_on = threading.Event()

    def requests() -> Iterator[Any]:
        yield client.encode_request(np.zeros((1, 4), np.float32))
        go_on.wait()

    replies = client.stub.EncodeStream(requests())
    next(replies)
    stopped = stop_in_background(server)
    _, error = status_of(replies)
    go_on.set()
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert stopped.result()


def test_a_stream_that_is_opened_while_the_server_stops_is_rejected(server: Any, client: Any, tokenizer: Any) -> None:
    go_on = threading.Event()
    tokenizer.hold()
    inside_already = client.stub.Encode.future(client.encode_request(np.zeros((1, 4), np.float32)))
    tokenizer.wait_entered()
    stopped = stop_in_background(server)
    eventually(lambda: server.app._rpc._service.calls._is_draining)
    # It says nothing: only by its own end would the server's wait for it end.
    _, error = status_of(client.stub.EncodeStream(iter(go_on.wait, True), timeout=60))
    # CANCELLED if the client did not know yet.
    assert error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    tokenizer.release()
    assert list(inside_already.result().shape) == [1]
    assert stopped.result()
    go_on.set()


class FakeCall:
    """What a stream sees of its caller; a reply counts as read when the test says so."""

    caller = None
    deadline = None
    request_id = "one"
    method = "EncodeStream"
    on_close: Any = None

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, bool]] = []
        self.ends: list[Any] = []

    def receive(self, then: Any, *, at_end: Any) -> None:
        self.received = then

    def send(self, message: bytes, then: Any, *, is_followed: bool) -> None:
        self.sent.append((message, is_followed))
        self.taken = then

    def end(self, status: Any = None, message: Any = None) -> None:
        self.ends.append(status)

    def fail(self, error: Exception) -> None:
        self.ends.append(error)


class FakeRequest:
    released = 0

    def __init__(self, *, is_ready: bool = True, nbytes: int = 5) -> None:
        self.is_ready = is_ready
        self.nbytes = nbytes

    def reply(self) -> bytes:
        return b"reply"

    def release(self) -> None:
        self.released += 1


def a_rejection(held: int) -> Rejection:
    return Rejection(Overloaded("full", retry_after_s=1.0), held, Metrics().unresolved("encode"), 1, 0.0)


class FakeRequests:
    """Notes which messages are started, and how many bytes are held, at most `room`."""

    def __init__(self, room: int = 1 << 30) -> None:
        self.started: list[bytes] = []
        self.room = room
        self.held = 0

    def trace(self, call: Any) -> None:
        return None

    def start(self, caller: Any, headers: Any, raw: bytes, *, held: int) -> None:
        self.started.append(raw)
        self.passed_on = held

    def try_hold(self, caller: Any, nbytes: int) -> bool:
        fits = self.held + nbytes <= self.room
        self.held += nbytes if fits else 0
        return fits

    def let_go(self, caller: Any, nbytes: int) -> None:
        self.held -= nbytes


def test_a_reply_that_is_sent_forgets_no_message_that_is_being_started() -> None:
    """A thread validates a large message while the reply before it is sent; then the server has no capacity for it."""
    call, requests = FakeCall(), FakeRequests()
    stream = stream_module.StreamCall(call, requests, None, on_close=lambda _: None)
    stream.start()
    for message in (b"one", b"two"):
        call.received(message)
        assert stream.accepted(FakeRequest())
    stream.ready()
    call.received(b"large")
    call.taken()
    stream.rejected(a_rejection(0))
    assert not call.ends
    call.taken()
    assert requests.started == [b"one", b"two", b"large", b"large"]
    assert stream.accepted(FakeRequest())


LARGE = 1 << 20


def a_large_stream(room: int) -> tuple[FakeCall, FakeRequests, Any]:
    """A stream that has one large request in the server, whose reply is being sent."""
    call, requests = FakeCall(), FakeRequests(room)
    stream = stream_module.StreamCall(call, requests, None, on_close=lambda _: None)
    stream.start()
    call.received(bytes(LARGE))
    del call.received
    assert stream.accepted(FakeRequest(nbytes=LARGE))
    stream.ready()
    return call, requests, stream


def test_a_message_like_the_last_one_is_received_only_if_there_is_room_for_it() -> None:
    call, requests, stream = a_large_stream(room=LARGE - 1)
    assert not hasattr(call, "received")
    # Without a request in the server nothing would make it try again: what comes then is refused if there is no room.
    call.taken()
    call.received(bytes(LARGE))
    assert (requests.passed_on, requests.held) == (0, 0)
    stream.rejected(a_rejection(0))
    assert [type(end) for end in call.ends] == [Overloaded]


def test_a_message_that_is_expected_counts_until_the_stream_is_idle() -> None:
    call, requests, _ = a_large_stream(room=LARGE)
    assert hasattr(call, "received")
    assert requests.held == LARGE
    call.taken()
    assert requests.held == 0


@pytest.mark.parametrize("how", ["it is accepted", "the stream drains", "the caller leaves", "there is no more"])
def test_what_is_held_is_let_go(how: str) -> None:
    call, requests, stream = a_large_stream(room=LARGE)
    call.received(bytes(LARGE))
    assert requests.passed_on == LARGE
    # Of a kept message the bytes stay counted.
    stream.rejected(a_rejection(LARGE))
    assert (len(requests.started), requests.held, call.ends) == (1 + 1, LARGE, [])
    if how == "the stream drains":
        stream.drain()
    elif how == "the caller leaves":
        call.on_close()
    else:
        call.taken()
        assert (len(requests.started), requests.passed_on) == (3, LARGE)
        requests.held -= LARGE
        assert stream.accepted(FakeRequest(nbytes=5))
        if how == "there is no more":
            call.on_close()
    assert requests.held == 0


def test_a_message_that_is_larger_than_expected_and_has_no_room_ends_the_stream() -> None:
    call, requests, stream = a_large_stream(room=LARGE)
    call.received(bytes(2 * LARGE))
    stream.rejected(a_rejection(LARGE))
    assert requests.held == 0
    assert not call.ends
    call.taken()
    assert [type(end) for end in call.ends] == [Overloaded]


def test_a_drain_answers_the_message_that_is_being_started_when_a_reply_is_sent() -> None:
    call, requests = FakeCall(), FakeRequests()
    stream = stream_module.StreamCall(call, requests, None, on_close=lambda _: None)
    stream.start()
    call.received(b"one")
    assert stream.accepted(FakeRequest())
    stream.ready()
    call.received(b"large")
    call.taken()
    stream.drain()
    assert not call.ends
    assert stream.accepted(FakeRequest())
    stream.ready()
    call.taken()
    assert len(call.sent) == 2
    assert [type(end) for end in call.ends] == [Draining]


def test_a_stream_that_is_starting_a_request_ends_when_it_has_answered_it() -> None:
    """The server stops while a thread validates a large request."""
    call, request, closed = FakeCall(), FakeRequest(), []
    requests = FakeRequests()
    stream = stream_module.StreamCall(call, requests, None, on_close=closed.append)
    stream.start()
    call.received(b"request")
    assert requests.started == [b"request"]
    stream.drain()
    assert not call.ends
    assert stream.accepted(request)
    stream.ready()
    assert call.sent == [(b"reply", False)]
    assert not call.ends
    call.taken()
    (error,) = call.ends
    assert isinstance(error, Draining)
    assert request.released == 1
    call.on_close()
    assert closed == [stream]
    assert request.released == 1


def test_replies_that_are_there_together_go_together() -> None:
    requests = [FakeRequest(is_ready=False) for _ in range(4)]
    call = FakeCall()
    stream = stream_module.StreamCall(call, FakeRequests(), None, on_close=lambda _: None)
    stream.start()
    for request in requests:
        call.received(b"request")
        assert stream.accepted(request)
    # A batch of three; the fourth is still at the device, and must not keep what was written back.
    for request in requests[:3]:
        request.is_ready = True
    for _ in range(3):
        stream.ready()
    for _ in range(3):
        call.taken()
    assert call.sent == [(b"reply", True), (b"reply", True), (b"reply", False)]
    requests[3].is_ready = True
    stream.ready()
    assert [is_followed for _, is_followed in call.sent] == [True, True, False, False]
