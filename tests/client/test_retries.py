"""What is tried again, how often, and until when."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import socket
import struct
import threading

import pytest

from vqserve_client import (
    CodebookNotFound,
    DeadlineExceeded,
    InvalidArgument,
    Overloaded,
    ServerError,
    Unavailable,
)
from vqserve_client.retries import RetryBudget, RetryPolicy


@pytest.mark.parametrize("code", ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"])
def test_retried_until_it_works(tiny, connect, failing, latents, code):
    tiny.script.extend([failing(code)] * 3)
    assert connect(tiny.target).encode(latents(2, 4)).shape == (2,)
    assert len(tiny.requests) == 4
    # All attempts of a request carry one id, which is what the server's log knows it by.
    assert len(set(tiny.request_ids)) == 1
    assert len(tiny.request_ids[0]) > 8


def test_retries_end(tiny, connect, failing, latents):
    tiny.script.extend([failing("RESOURCE_EXHAUSTED", "full", vqserve_retry_after_ms="20")] * 9)
    with pytest.raises(Overloaded, match="full; tried 3 times") as caught:
        connect(tiny.target, retries=2).encode(latents(2, 4))
    assert caught.value.retry_after_s == 0.02
    assert caught.value.code == "RESOURCE_EXHAUSTED"
    assert len(tiny.requests) == 3


def test_no_retries(tiny, connect, failing, latents):
    tiny.script.append(failing("UNAVAILABLE"))
    with pytest.raises(Unavailable):
        connect(tiny.target, retries=0).encode(latents(2, 4))
    assert len(tiny.requests) == 1


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("INVALID_ARGUMENT", InvalidArgument),
        ("INTERNAL", ServerError),
        ("UNKNOWN", ServerError),
        ("DEADLINE_EXCEEDED", DeadlineExceeded),
        ("DATA_LOSS", ServerError),
    ],
)
def test_nothing_else_is_retried(tiny, connect, failing, latents, code, kind):
    tiny.script.append(failing(code, "scripted", vqserve_request_id="the-servers-own"))
    with pytest.raises(kind, match="scripted") as caught:
        connect(tiny.target).encode(latents(2, 4))
    assert len(tiny.requests) == 1
    error = caught.value
    assert (error.code, error.codebook, error.target, error.request_id) == (
        code,
        "small",
        tiny.target,
        "the-servers-own",
    )


def test_a_hint_beyond_the_deadline_is_not_waited_for(tiny, connect, failing, latents):
    tiny.script.append(failing("RESOURCE_EXHAUSTED", "full", vqserve_retry_after_ms="3600000"))
    with pytest.raises(Overloaded) as caught:
        connect(tiny.target).encode(latents(2, 4))
    assert caught.value.retry_after_s == 3600
    assert len(tiny.requests) == 1


def test_a_server_that_wants_no_retry_gets_none(tiny, connect, failing, latents):
    tiny.script.append(failing("RESOURCE_EXHAUSTED", "full", grpc_retry_pushback_ms="-1"))
    with pytest.raises(Overloaded):
        connect(tiny.target).encode(latents(2, 4))
    assert len(tiny.requests) == 1


@pytest.mark.parametrize("hint", ["soon", "-5", "nan", "inf", ""])
def test_a_hint_that_makes_no_sense_is_none(tiny, connect, failing, latents, hint):
    tiny.script.append(failing("RESOURCE_EXHAUSTED", "full", vqserve_retry_after_ms=hint))
    with pytest.raises(Overloaded) as caught:
        connect(tiny.target, retries=0).encode(latents(2, 4))
    assert caught.value.retry_after_s is None


def test_a_server_that_hangs(tiny, connect, latents):
    client = connect(tiny.target)
    client.codebooks()
    tiny.gate.clear()
    with pytest.raises(DeadlineExceeded, match=r"^the server did not answer in time \(server") as caught:
        client.encode(latents(2, 4), timeout=1)
    assert isinstance(caught.value, TimeoutError)
    # The server sees that the call was cancelled.
    assert tiny.cancelled.acquire(timeout=60)


def test_one_timeout_for_all_retries(tiny, connect, failing, latents):
    tiny.script.append(failing("RESOURCE_EXHAUSTED", vqserve_retry_after_ms="400"))
    connect(tiny.target, timeout=5).encode(latents(2, 4))
    first, second = tiny.timeouts
    # The deadline stays where it was: what was waited for is missing the second time (gRPC rounds what it sends).
    assert second < first - 0.3


def test_no_timeout(tiny, connect, latents):
    assert connect(tiny.target, timeout=math.inf).encode(latents(2, 4)).shape == (2,)
    # gRPC sends "no timeout" as a few centuries.
    assert tiny.timeouts[0] > 1e9


@pytest.mark.parametrize(
    ("target", "cause"),
    [
        ("127.0.0.1:1", "Connection refused"),
        # Before 1.73 gRPC asked the system for any name.
        ("no host:50051", "(Misformatted domain name|Domain name not found)"),
        ("unix:///nowhere/socket", "No such file or directory"),
    ],
)
def test_no_server_listens(connect, latents, target, cause):
    with pytest.raises(Unavailable) as caught:
        connect(target, retries=1).encode(latents(2, 4))
    error = caught.value
    assert isinstance(error, ConnectionError)
    hint = "is the server running, and is this its address? `vqserved serve` starts one"
    text = f"cannot connect to the server: {cause}; tried 2 times {re.escape(f'(server {target}): {hint}')}"
    assert re.fullmatch(text, str(error))
    # No log has a request that was never sent.
    assert (error.code, error.target, error.request_id) == ("UNAVAILABLE", target, None)


@pytest.mark.parametrize("words", [b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", b"SSH-2.0-OpenSSH\r\n"])
def test_another_protocol_answers(connect, latents, words):
    with Stranger(words) as stranger, pytest.raises(Unavailable) as caught:
        connect(stranger.target, retries=0).encode(latents(2, 4))
    assert caught.value.message == "cannot connect to the server: what listens there does not speak gRPC"


def test_another_protocol_answered_and_stopped(connect, latents):
    with Stranger(b"HTTP/1.1 400 Bad Request\r\n\r\n", patience=1) as stranger, pytest.raises(Unavailable) as caught:
        connect(stranger.target, retries=2).encode(latents(2, 4))
    # The later attempts were refused, a less useful cause.
    assert caught.value.message == (
        "cannot connect to the server: what listens there does not speak gRPC; tried 3 times"
    )


def test_a_connection_lost_under_a_request(tiny, connect, latents):
    tiny.gate.clear()
    with DroppingProxy(tiny.target, drops=0) as proxy:
        client = connect(proxy.target, retries=0)
        client.codebooks()
        cut = threading.Thread(target=lambda: tiny.arrived.acquire() and proxy.cut())
        cut.start()
        with pytest.raises(Unavailable, match=r"^the connection to the server was lost \(server") as caught:
            client.encode(latents(2, 4))
        cut.join()
    assert caught.value.request_id == tiny.request_ids[0]


def test_the_server_s_own_reason_is_quoted(tiny, connect, failing, latents):
    tiny.script.append(failing("UNAVAILABLE", "the device failed: out of luck"))
    with pytest.raises(Unavailable, match=r"^the device failed: out of luck \(server"):
        connect(tiny.target, retries=0).encode(latents(2, 4))


def test_a_connection_dropped_under_a_request_is_retried(tiny, connect, latents):
    with DroppingProxy(tiny.target, drops=2) as proxy:
        assert connect(proxy.target, timeout=30).encode(latents(2, 4)).shape == (2,)
    assert proxy.dropped == 2


class DroppingProxy:
    """Hands on connections, but resets the first few of them once the client has spoken."""

    def __init__(self, target: str, *, drops: int) -> None:
        host, port = target.split(":")
        self._upstream = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._drops = drops
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.dropped = 0
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self):
        self._start(self._accept)
        return self

    def __exit__(self, *_):
        for one in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join()

    def cut(self):
        """End the connections that are open."""
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _start(self, target, *arguments):
        thread = threading.Thread(target=target, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                accepted, _ = self._listener.accept()
                if self.dropped < self._drops:
                    accepted.recv(1)
                    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    accepted.close()
                    self.dropped += 1
                    continue
                upstream = socket.create_connection(self._upstream)
                self._sockets += [accepted, upstream]
                self._start(self._copy, accepted, upstream)
                self._start(self._copy, upstream, accepted)

    @staticmethod
    def _copy(source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)


class Stranger:
    """Listens, but is no gRPC server: sends the same bytes on every connection; closes after `patience` connections."""

    def __init__(self, words: bytes, *, patience: int | None = None) -> None:
        self._words = words
        self._patience = patience
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._accept)
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _accept(self):
        with contextlib.suppress(OSError):
            for heard in itertools.count(1):
                accepted, _ = self._listener.accept()
                if heard == self._patience:
                    self._listener.close()
                with accepted:
                    accepted.recv(1 << 16)
                    accepted.sendall(self._words)


def test_unknown_codebooks_are_listed(serve_tiny, codes, connect, latents):
    server = serve_tiny(codes("a"), codes("b"))
    client = connect(server.target)
    with pytest.raises(CodebookNotFound, match="2 codebooks are served, choose one with codebook=: a, b"):
        client.encode(latents(2, 4))
    with pytest.raises(CodebookNotFound, match="no codebook 'c' is served, only: a, b"):
        client.encode(latents(2, 4), codebook="c")
    assert client.encode(latents(2, 4), codebook="b").shape == (2,)
    # One that is served since the list was fetched is found.
    server.codes["c"] = codes("c")
    assert client.encode(latents(2, 4), codebook="c").shape == (2,)


def test_no_codebook_at_all(serve_tiny, connect, latents):
    with pytest.raises(CodebookNotFound, match="no codebook is served"):
        connect(serve_tiny().target).encode(latents(2, 4))


def test_a_codebook_that_is_no_longer_served(serve_tiny, codes, connect, latents):
    server = serve_tiny(codes("a"), codes("b"))
    client = connect(server.target, codebook="a")
    client.encode(latents(2, 4))
    del server.codes["a"]
    with pytest.raises(CodebookNotFound, match="no codebook 'a' is served, only: b"):
        client.encode(latents(2, 4))


def test_concurrent_chunks_back_off_each_for_itself(tiny, connect, failing, latents):
    tiny.script.extend([failing("RESOURCE_EXHAUSTED", "full", vqserve_retry_after_ms="1")] * 6)
    array = latents(100, 4)
    indices = connect(tiny.target, max_message_bytes=1024).encode(array)
    assert (indices == tiny.codes["small"].encode(array)).all()


def test_delays_grow_have_a_cap_and_heed_the_hint():
    policy = RetryPolicy(10)
    for failures in range(1, 11):
        full = min(5.0, 0.1 * 2 ** (failures - 1))
        assert full / 2 <= policy.delay_s(failures, None) <= full
    assert policy.delay_s(11, None) is None
    assert 7 <= policy.delay_s(1, 7.0) <= 8.75
    assert RetryPolicy(5000).delay_s(4999, None) <= 5


def test_a_burst_of_retries_is_free_and_then_there_is_one_a_second():
    budget = RetryBudget()
    waits = [budget.spend() for _ in range(110)]
    assert waits[:100] == [0] * 100
    # Each of the last ten waits for a token of its own; time has brought some of them already.
    assert waits[-1] <= 10
    assert waits[-10:] == sorted(waits[-10:])


def test_ten_successes_pay_for_a_retry():
    budget = RetryBudget(capacity=1, per_second=1e-9)
    assert budget.spend() == 0
    assert budget.spend() > 1e6
    for _ in range(10):
        assert budget.is_spent
        budget.earn()
    # It has back what the second one took, and is still without a token for a third.
    assert budget.spend() > 1e6
    for _ in range(3):
        budget.refund()
    assert not budget.is_spent


def test_an_overloaded_server_gets_few_retries(tiny, connect, failing, latents):
    """No storm: of many calls that are refused, most are not sent again within their timeout."""
    client = connect(tiny.target, timeout=5)
    client.codebooks()
    client._core.pool.retry_budget = RetryBudget(capacity=5, per_second=0.01)
    calls = 30
    tiny.script.extend([failing("RESOURCE_EXHAUSTED")] * 4 * calls)
    for _ in range(calls):
        with pytest.raises(Overloaded):
            client.encode(latents(2, 4))
    assert calls + 5 <= len(tiny.requests) <= calls + 10


def test_a_server_that_cannot_be_reached_costs_no_budget(connect, latents):
    client = connect("127.0.0.1:1", retries=2)
    with pytest.raises(Unavailable):
        client.encode(latents(2, 4))
    assert not client._core.pool.retry_budget.is_spent
