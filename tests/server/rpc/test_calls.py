"""Calls of methods that are not there, without a request, too many, and of the services beside the tokenizer's."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from support.waiting import eventually
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_server.rpc.call import Call
from vqserve_server.rpc.request import Request, UnaryCall
from vqserve_server.rpc.stream import StreamCall
from vqserve_server.rpc.transport import Transport

SERVICE = "vqserve.v1.TokenizerService"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture
def tokenizer(fake: Callable[..., Any]) -> Any:
    return fake()


@pytest.fixture
def server(tokenizer: Any, serving: Callable[..., Any]) -> Any:
    return serving(tokenizer, max_concurrent_rpcs=4)


@pytest.fixture
def client(server: Any, connect: Callable[..., Any]) -> Any:
    return connect(server.target)


@pytest.fixture
def health(client: Any) -> Any:
    return health_pb2_grpc.HealthStub(client.channel)


def failure(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


def raw_stream(client: Any, path: str, requests: Iterator[bytes]) -> list[bytes]:
    return list(client.channel.stream_stream(path)(requests, timeout=60))


@pytest.mark.parametrize(
    "path", [f"/{SERVICE}/Encod", "/vqserve.v1.Tokenizer/Encode", "/x", f"/{SERVICE}/" + "x" * 3000]
)
def test_a_method_that_is_not_there(client: Any, path: str) -> None:
    code, text = failure(lambda: client.channel.unary_unary(path)(b"", timeout=60))
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert path[:200] in text


@pytest.mark.parametrize(
    "path", [f"/{SERVICE}/Encode", f"/{SERVICE}/Decode", f"/{SERVICE}/ListCodebooks", "/grpc.health.v1.Health/Check"]
)
def test_a_call_without_a_request(client: Any, path: str) -> None:
    code, text = failure(lambda: raw_stream(client, path, iter([])))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "send exactly one message" in text


def test_a_second_request_is_not_read(client: Any, tokenizer: Any) -> None:
    request = client.encode_request(np.zeros((3, 4), np.float32)).SerializeToString()
    (reply,) = raw_stream(client, f"/{SERVICE}/Encode", iter([request, b"nonsense"]))
    assert list(pb.EncodeResponse.FromString(reply).shape) == [3]


@pytest.mark.parametrize(
    "path", [f"/{SERVICE}/EncodeStream", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"]
)
def test_a_stream_without_a_request_ends(client: Any, path: str) -> None:
    assert raw_stream(client, path, iter([])) == []


def test_too_many_calls_are_rejected_until_others_end(server: Any, client: Any, health: Any) -> None:
    ends = [threading.Event() for _ in range(4)]
    streams = [client.stub.EncodeStream(iter(end.wait, True)) for end in ends]
    eventually(lambda: server.app._rpc._service.calls._active == 4)
    with pytest.raises(grpc.RpcError) as caught:
        client.stub.ListCodebooks(pb.ListCodebooksRequest(), timeout=60)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "too many calls" in caught.value.details()
    assert dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
    assert health.Check(health_pb2.HealthCheckRequest(), timeout=60).status == SERVING
    ends[0].set()
    assert list(streams[0]) == []
    eventually(lambda: server.app._rpc._service.calls._active == 3)
    assert len(client.stub.ListCodebooks(pb.ListCodebooksRequest(), timeout=60).codebooks) == 1
    for end, stream in zip(ends[1:], streams[1:], strict=True):
        end.set()
        assert list(stream) == []


def test_the_health_of_what_is_not_there(health: Any) -> None:
    request = health_pb2.HealthCheckRequest(service="other")
    assert failure(lambda: health.Check(request))[0] is grpc.StatusCode.NOT_FOUND
    watch = health.Watch(request)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()
    assert health.Check(health_pb2.HealthCheckRequest(service=SERVICE)).status == SERVING


@pytest.mark.parametrize("method", ["Check", "Watch"])
def test_bytes_that_do_not_ask_for_health(client: Any, method: str) -> None:
    code, _ = failure(lambda: raw_stream(client, f"/grpc.health.v1.Health/{method}", iter([b"\xff\xff"])))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


def test_watchers_that_disconnect_are_forgotten(server: Any, health: Any) -> None:
    for _ in range(20):
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        watch.cancel()
    eventually(lambda: not server.app._rpc._health._watchers)


def test_reflection_answers_question_after_question(client: Any) -> None:
    reflection = reflection_pb2_grpc.ServerReflectionStub(client.channel)
    questions = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
        reflection_pb2.ServerReflectionRequest(file_by_filename="none.proto"),
    ]
    services, file, none = reflection.ServerReflectionInfo(iter(questions))
    assert SERVICE in {service.name for service in services.list_services_response.service}
    assert file.file_descriptor_response.file_descriptor_proto
    assert none.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
    assert failure(lambda: raw_stream(client, REFLECTION, iter([b"\xff\xff"])))[0] is grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture
def transport() -> Iterator[Callable[..., Any]]:
    """Start a transport of some handlers; returns it and a channel to it."""
    made: list[tuple[Transport, Any]] = []

    def start(**handlers: Any) -> Any:
        methods = {f"/t.T/{name}": handler for name, handler in handlers.items()}
        one = Transport(methods, options=[("grpc.so_reuseport", 0)], max_calls=100)
        port = one.listen("127.0.0.1:0")
        one.start()
        made.append((one, grpc.insecure_channel(f"127.0.0.1:{port}")))
        return made[-1]

    yield start
    for one, channel in made:
        channel.close()
        one.stop(0.1)


def test_a_handler_that_fails_ends_its_call_only(transport: Callable[..., Any]) -> None:
    def fails(call: Call) -> None:
        raise RuntimeError("a secret")

    _, channel = transport(Fails=fails, Echo=lambda call: call.receive(lambda raw: call.end(message=raw)))
    for _ in range(3):
        code, text = failure(lambda: channel.unary_unary("/t.T/Fails")(b"", timeout=60))
        assert code is grpc.StatusCode.INTERNAL
        assert "secret" not in text
        assert channel.unary_unary("/t.T/Echo")(b"abc", timeout=60) == b"abc"


def test_a_stop_cancels_what_does_not_end(transport: Callable[..., Any]) -> None:
    begun, over = threading.Event(), threading.Event()

    def hangs(call: Call) -> None:
        call.on_close = over.set
        begun.set()

    one, channel = transport(Hangs=hangs)
    hanging = channel.unary_unary("/t.T/Hangs").future(b"", timeout=60)
    assert begun.wait(60)
    one.stop(0.1)
    assert over.is_set()
    assert hanging.exception().code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    # Once more is fine.
    one.stop(0.1)


def test_ended_calls_leave_nothing_to_collect(server: Any, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only the collector can free, a request of 64 MiB among it, would stay for long."""
    kept: list[weakref.ref[Any]] = []
    for kind in (Call, UnaryCall, StreamCall, Request):
        plain = kind.__init__

        def note(self: Any, *args: Any, plain: Any = plain, **options: Any) -> None:
            kept.append(weakref.ref(self))
            plain(self, *args, **options)

        monkeypatch.setattr(kind, "__init__", note)
    requests = [client.encode_request(np.zeros((n, 4), np.float32)) for n in range(1, 9)]
    gc.collect()
    gc.disable()
    try:
        for request in requests:
            client.stub.Encode(request)
        assert len(list(client.stub.EncodeStream(iter(requests)))) == 8
        gone = client.stub.EncodeStream(iter(lambda: requests[0], None))
        next(gone)
        gone.cancel()
        client.stub.Encode.future(requests[0]).cancel()
        assert len(kept) > 30
        # The stubs' own garbage is in this process too, but knows nothing of these.
        eventually(lambda: not [one() for one in kept if one() is not None])
    finally:
        gc.enable()
