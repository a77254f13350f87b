"""What one caller may have in the server, and what is refused because it would be late."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from support.http2 import Peer
from support.waiting import eventually
from vqserve_server.rpc import transport as transport_module

ROWS = np.zeros((3, 4), np.float32)


@pytest.fixture
def book(fake: Callable[..., Any]) -> Any:
    return fake()


def calls(client: Any, count: int, *, timeout: float = 60.0) -> list[Any]:
    return [client.stub.Encode.future(client.encode_request(ROWS), timeout=timeout) for _ in range(count)]


def refused(calls: list[Any]) -> list[Any]:
    return [call for call in calls if call.done() and call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED]


def test_one_caller_cannot_take_all(
    book: Any, serving: Callable[..., Any], connect: Callable[[str], Any], tmp_path: Path
) -> None:
    server = serving(book, max_queue_requests=16, unix_socket=str(tmp_path / "vqserve.sock"))
    greedy, other = connect(server.target), connect(f"unix:{tmp_path}/vqserve.sock")
    book.hold()
    sent = calls(greedy, 20)
    eventually(lambda: len(refused(sent)) == 6)
    for call in refused(sent):
        assert call.details().startswith("too many requests of the caller 127.0.0.1 in the server")
        assert int(dict(call.trailing_metadata())["grpc-retry-pushback-ms"]) >= 50
    # Another caller still finds room.
    answered = calls(other, 1)
    eventually(lambda: server.app.engine.admission.requests == 15)
    book.release()
    assert list(answered[0].result().shape) == [3]
    assert sum(list(call.result().shape) == [3] for call in sent if call not in refused(sent)) == 14
    assert server.app.engine.stats.refused == {"caller_requests": 6}


@pytest.mark.parametrize("limit", ["max_caller_requests", "max_caller_rows", "max_caller_bytes"])
def test_each_limit_of_a_caller_from_both_sides(
    book: Any, serving: Callable[..., Any], connect: Callable[[str], Any], limit: str
) -> None:
    client = connect(serving(book).target)
    size = len(client.encode_request(ROWS).SerializeToString()) + len(ROWS)
    most = {"max_caller_requests": 5, "max_caller_rows": 5 * len(ROWS), "max_caller_bytes": 5 * size}[limit]
    server = serving(book, **{limit: most})
    client = connect(server.target)
    book.hold()
    sent = calls(client, 5)
    eventually(lambda: server.app.engine.admission.requests == 5)
    (one_more,) = calls(client, 1)
    assert one_more.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert one_more.details().startswith(f"too many {limit.rpartition('_')[2]} of the caller 127.0.0.1")
    book.release()
    for call in sent:
        assert list(call.result().shape) == [3]


def test_what_would_be_late_is_refused_at_once(
    book: Any, serving: Callable[..., Any], connect: Callable[[str], Any]
) -> None:
    server = serving(book, max_batch_rows=3)
    client = connect(server.target)
    plain = book.encode_rows

    def slow(rows: np.ndarray, **options: Any) -> np.ndarray:
        time.sleep(0.1)
        return plain(rows, **options)

    book.encode_rows = slow

    def some_are_refused() -> bool:
        # A tenth of a second each: the last of ten cannot be in time, once the server knows how slow it is.
        sent = calls(client, 10, timeout=0.5)
        codes = [call.code() for call in sent]
        assert {*codes} <= {
            grpc.StatusCode.OK,
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            grpc.StatusCode.DEADLINE_EXCEEDED,
        }
        for call in refused(sent):
            assert "too busy to answer before the deadline" in call.details()
            assert int(dict(call.trailing_metadata())["grpc-retry-pushback-ms"]) >= 50
        return bool(refused(sent))

    eventually(some_are_refused)
    assert server.app.engine.stats.refused["deadline"] > 0


def test_what_has_expired_or_was_cancelled_is_counted(
    book: Any, serving: Callable[..., Any], connect: Callable[[str], Any]
) -> None:
    server = serving(book)
    client = connect(server.target)
    stats = server.app.engine.stats
    book.hold()
    (computing,) = calls(client, 1)
    book.wait_entered()
    (cancelled,) = calls(client, 1)
    eventually(lambda: server.app.engine.scheduler._queue.jobs == 1)
    cancelled.cancel()
    eventually(lambda: stats.cancelled + stats.expired == 1)
    (expired,) = calls(client, 1, timeout=0.2)
    assert expired.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: stats.cancelled + stats.expired == 2)
    book.release()
    assert list(computing.result().shape) == [3]
    eventually(lambda: server.app.engine.admission.requests == 0)
    assert stats.cancelled + stats.expired == 2
    assert len(book.batches) == 1


def test_refused_callers_that_do_not_read_keep_nobody_out(
    book: Any, serving: Callable[..., Any], connect: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport_module, "_MOST_REFUSED", 8)
    server = serving(book, max_concurrent_rpcs=4)
    transport = server.app._rpc._transport
    peer = Peer(server.target, buffer=2048)
    peer.fill()
    eventually(lambda: len(transport._calls) >= 8)
    client = connect(server.target)
    for _ in range(3):
        # gRPC gives up a connection that is full after 20 seconds: not only then.
        assert list(client.stub.Encode(client.encode_request(ROWS), timeout=10).shape) == [3]
    peer.close()
    eventually(lambda: not transport._calls)
