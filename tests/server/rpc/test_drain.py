"""A server that stops: what its callers see, alone and with another server beside it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support.http2 import ACK, DATA, END_STREAM, GOAWAY, HEADERS, PING, RST_STREAM, Peer
from support.waiting import DEADLINE_S, eventually
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve.v1 import tokenizer_pb2_grpc

REQUEST = pb.EncodeRequest(dtype=pb.DTYPE_FLOAT32, shape=[1, 4], latents=bytes(16))
# What clients of gRPC in any language can do: take servers in turn, and leave those that say NOT_SERVING.
BALANCED = json.dumps(
    {"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": "vqserve.v1.TokenizerService"}}
)


def stop_in_background(server: Any) -> Future[bool]:
    return asyncio.run_coroutine_threadsafe(server.app.stop(), server.loop)


@pytest.fixture
def held(fake: Callable[..., Any], serving: Callable[..., Any]) -> Iterator[tuple[Any, Any]]:
    """A server, and its tokenizer, which computes nothing until it is released."""
    tokenizer = fake()
    server = serving(tokenizer)
    tokenizer.hold()
    yield server, tokenizer
    tokenizer.release()


def refuses(target: str) -> bool:
    host, _, port = target.rpartition(":")
    try:
        socket.create_connection((host, int(port))).close()
    except ConnectionError:
        return True
    return False


def test_callers_are_told_at_once_and_what_was_accepted_is_answered(held: Any) -> None:
    server, tokenizer = held
    peer = Peer(server.target)
    peer.call("Encode", REQUEST.SerializeToString(), end=True)
    tokenizer.wait_entered()
    stopped = stop_in_background(server)
    frames = peer.frames()
    for kind, _, _ in frames:
        if kind == GOAWAY:
            break
    eventually(lambda: refuses(server.target))
    assert not stopped.done()
    tokenizer.release()
    got = b""
    for kind, flags, body in frames:
        assert kind != RST_STREAM
        got += body if kind == DATA else b""
        if kind == PING and not flags:
            peer.send(PING, body, flags=ACK)
        if kind == HEADERS and flags & END_STREAM:
            break
    assert list(pb.EncodeResponse.FromString(got[5:]).shape) == [1]
    peer.close()
    assert stopped.result()


def test_a_request_of_a_call_that_was_accepted_may_still_arrive(held: Any) -> None:
    server, tokenizer = held
    tokenizer.release()
    peer = Peer(server.target)
    peer.begin("/vqserve.v1.TokenizerService/Encode")
    eventually(lambda: server.app._rpc._service.calls._active == 1)
    stopped = stop_in_background(server)
    frames = peer.frames()
    assert any(kind == GOAWAY for kind, _, _ in frames)
    raw = REQUEST.SerializeToString()
    peer.send(DATA, b"\0" + len(raw).to_bytes(4, "big") + raw, flags=END_STREAM, stream=1)
    got = b""
    for kind, _, body in frames:
        got += body if kind == DATA else b""
        if kind == HEADERS and got:
            break
    assert list(pb.EncodeResponse.FromString(got[5:]).shape) == [1]
    peer.close()
    assert stopped.result()


def test_watchers_of_health_learn_it_before_the_connection_ends(held: Any) -> None:
    server, tokenizer = held
    busy, watcher = Peer(server.target), Peer(server.target)
    busy.call("Encode", REQUEST.SerializeToString(), end=True)
    tokenizer.wait_entered()
    watcher.begin("/grpc.health.v1.Health/Watch")
    watcher.send(DATA, bytes(5), flags=END_STREAM, stream=1)
    frames = watcher.frames()
    seen: list[object] = []
    states = {b"\x08\x01": "SERVING", b"\x08\x02": "NOT_SERVING"}
    stopped = None
    for kind, _, body in frames:
        if kind == DATA and body:
            seen.append(states[body[5:]])
            stopped = stopped or stop_in_background(server)
        elif kind == GOAWAY:
            seen.append("GOAWAY")
            break
    assert seen == ["SERVING", "NOT_SERVING", "GOAWAY"]
    tokenizer.release()
    busy.close()
    watcher.close()
    assert stopped is not None
    assert stopped.result()


def test_a_client_of_two_servers_loses_no_call_when_one_stops(
    held: Any, fake: Callable[..., Any], serving: Callable[..., Any]
) -> None:
    server, tokenizer = held
    tokenizer.release()
    other = serving(fake())
    target = f"ipv4:{server.target},{other.target}"
    channel = grpc.insecure_channel(target, options=[("grpc.service_config", BALANCED)])
    stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
    ends, is_over = Counter[str](), threading.Event()

    def call() -> None:
        while not is_over.is_set():
            try:
                stub.Encode(REQUEST, timeout=60)
                ends["OK"] += 1
            except grpc.RpcError as error:
                ends[f"{error.code()}: {error.details()}"] += 1

    stats = server.app.engine.stats, other.app.engine.stats
    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    eventually(lambda: all(each.requests > 50 for each in stats))
    # An open call, so that the stop is not over at once.
    peer = Peer(server.target)
    peer.begin("/vqserve.v1.TokenizerService/Encode")
    eventually(lambda: server.app._rpc._service.calls._active >= 1)
    stopped = stop_in_background(server)
    eventually(lambda: refuses(server.target))
    before = stats[1].requests
    eventually(lambda: stats[1].requests > before + 100)
    assert not stopped.done()
    peer.close()
    assert stopped.result()
    is_over.set()
    for thread in threads:
        thread.join()
    channel.close()
    assert list(ends) == ["OK"], ends


def test_a_client_of_this_server_alone_is_told_that_it_is_unavailable(held: Any, connect: Callable[..., Any]) -> None:
    server, tokenizer = held
    client = connect(server.target)
    inside = client.stub.Encode.future(REQUEST, timeout=60)
    tokenizer.wait_entered()
    stopped = stop_in_background(server)
    eventually(lambda: refuses(server.target))
    health = health_pb2_grpc.HealthStub(client.channel)
    for call in (client.stub.Encode.future(REQUEST, timeout=60), health.Check.future(health_pb2.HealthCheckRequest())):
        # CANCELLED if the client did not know yet.
        assert call.exception().code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    tokenizer.release()
    assert list(inside.result().shape) == [1]
    assert stopped.result()
    assert client.stub.Encode.future(REQUEST, timeout=60).exception().code() is grpc.StatusCode.UNAVAILABLE


def test_who_reads_nothing_does_not_hold_the_stop(fake: Callable[..., Any], serving: Callable[..., Any]) -> None:
    server = serving(fake())
    peer = Peer(server.target, buffer=2048)
    peer.fill()
    transport = server.app._rpc._transport
    assert not stop_in_background(server).result(DEADLINE_S)
    # gRPC has not given up the connection yet.
    assert any(thread.is_alive() for thread in transport._threads)
    peer.close()
    eventually(lambda: not any(thread.is_alive() for thread in transport._threads))
