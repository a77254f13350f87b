"""A tiny server that can be hostile, and one face for both kinds of client."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health, health_pb2_grpc

from support.brute_force import nearest
from support.names import NameServer, name_server
from vqserve import payload
from vqserve.codebook_info import CodebookInfo
from vqserve.dtypes import BFLOAT16
from vqserve.layout import Layout, channel_axis, grid_shape, latents_shape
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve.v1 import tokenizer_pb2_grpc
from vqserve_client import AsyncClient, Client

# A request and the honest reply to it; returns the reply to send, or aborts.
Behaviour = Callable[[Any, grpc.ServicerContext, Callable[[], Any]], Any]

LAYOUTS = {
    pb.LAYOUT_UNSPECIFIED: None,
    pb.LAYOUT_CHANNELS_FIRST: Layout.CHANNELS_FIRST,
    pb.LAYOUT_CHANNELS_LAST: Layout.CHANNELS_LAST,
}


class Codes:
    """One codebook of the tiny server; decoded latents are its rows twice over, so that widths differ."""

    def __init__(self, name: str, num_codes: int = 300, dim: int = 4, *, seed: int = 0) -> None:
        self.rows = np.random.default_rng(seed).standard_normal((num_codes, dim)).astype(np.float32)
        self.info = CodebookInfo(
            name=name,
            digest=f"{num_codes:032x}{seed:032x}",
            kind="vq",
            num_codes=num_codes,
            vocab_size=num_codes,
            input_dim=dim,
            code_dim=dim,
            output_dim=2 * dim,
        )

    def encode(self, rows: np.ndarray) -> np.ndarray:
        return nearest(rows, self.rows)

    def decode(self, indices: np.ndarray) -> np.ndarray:
        return np.concatenate([self.rows, -self.rows], 1)[indices]


class TinyServer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """Answers honestly but for what is scripted: one behaviour a request, in order of arrival."""

    def __init__(self, *codes: Codes) -> None:
        self.codes = {one.info.name: one for one in codes}
        self.script: deque[Behaviour] = deque()
        self.list_script: deque[Callable[[pb.ListCodebooksResponse], None]] = deque()
        self.requests: list[Any] = []
        self.request_ids: list[str] = []
        self.timeouts: list[float] = []
        self.lists = 0
        self.arrived = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        self.cancelled = threading.Semaphore(0)
        self.active = 0
        self.peak = 0
        self.target = ""
        self.health: health.HealthServicer | None = None
        self._lock = threading.Lock()

    def ListCodebooks(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self.lists += 1
        reply = pb.ListCodebooksResponse()
        for one in self.codes.values():
            fields = {key: getattr(one.info, key) for key in vars(one.info) if key != "layout"}
            wire = next(number for number, known in LAYOUTS.items() if known is one.info.layout)
            reply.codebooks.append(pb.CodebookInfo(**fields, layout=wire))
        if self.list_script:
            self.list_script.popleft()(reply)
        return reply

    def Encode(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        def honest() -> Any:
            one = self._codes(request, context)
            latents = payload.from_bytes(request.latents, request.dtype, request.shape)
            if request.dtype == pb.DTYPE_BFLOAT16:
                latents = BFLOAT16.widen(latents)
            layout = LAYOUTS[request.layout]
            rows = np.moveaxis(latents, channel_axis(layout), -1).reshape(-1, latents.shape[channel_axis(layout)])
            indices = one.encode(rows)
            return pb.EncodeResponse(
                digest=one.info.digest,
                dtype=request.index_dtype,
                shape=grid_shape(request.shape, layout),
                indices=payload.to_bytes(indices, request.index_dtype),
            )

        return self._answer(request, context, honest)

    def Decode(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        def honest() -> Any:
            one = self._codes(request, context)
            indices = payload.from_bytes(request.indices, request.dtype, request.shape).astype(np.int64)
            if indices.size and not 0 <= indices.min() <= indices.max() < one.info.num_codes:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "indices[0] is out of range")
            rows = one.decode(indices) if request.output != pb.DECODE_OUTPUT_CODE_ROWS else one.rows[indices]
            layout = LAYOUTS[request.layout]
            rows = np.moveaxis(rows, -1, channel_axis(layout))
            return pb.DecodeResponse(
                digest=one.info.digest,
                dtype=request.latent_dtype,
                shape=latents_shape(tuple(request.shape), rows.shape[channel_axis(layout)], layout),
                latents=payload.to_bytes(rows, request.latent_dtype),
            )

        return self._answer(request, context, honest)

    def replace(self, name: str, /, **fields: Any) -> None:
        """Change what is said of a codebook."""
        self.codes[name].info = replace(self.codes[name].info, **fields)

    def _codes(self, request: Any, context: grpc.ServicerContext) -> Codes:
        one = self.codes.get(request.codebook)
        if one is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no codebook {request.codebook!r}")
        assert one is not None
        if request.expected_digest not in ("", one.info.digest):
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the codebook has another digest")
        return one

    def _answer(self, request: Any, context: grpc.ServicerContext, honest: Callable[[], Any]) -> Any:
        with self._lock:
            self.requests.append(request)
            self.request_ids.append(dict(context.invocation_metadata()).get("vqserve-request-id", ""))
            self.timeouts.append(context.time_remaining())
            self.active += 1
            self.peak = max(self.peak, self.active)
            behaviour = self.script.popleft() if self.script else None
        self.arrived.release()
        context.add_callback(lambda: self.cancelled.release() if context.code() is None else None)
        try:
            self.gate.wait()
            return honest() if behaviour is None else behaviour(request, context, honest)
        finally:
            with self._lock:
                self.active -= 1


class StreamingServer(TinyServer):
    """One that has streams, too; `grpc_server` is what serves it."""

    grpc_server: grpc.Server

    def __init__(self, *codes: Codes) -> None:
        super().__init__(*codes)
        self.streams = 0
        self.singles = 0

    def Encode(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self.singles += 1
        return super().Encode(request, context)

    def Decode(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self.singles += 1
        return super().Decode(request, context)

    def EncodeStream(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        return self._stream(super().Encode, requests, context)

    def DecodeStream(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        return self._stream(super().Decode, requests, context)

    def _stream(self, answer: Any, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        self.streams += 1
        for request in requests:
            reply = answer(request, context)
            # A scripted behaviour may give several replies.
            yield from reply if isinstance(reply, list) else [reply]


@contextlib.contextmanager
def running(
    servicer: TinyServer,
    address: str = "127.0.0.1:0",
    credentials: grpc.ServerCredentials | None = None,
    **options: int,
) -> Iterator[grpc.Server]:
    limits = {"grpc.max_receive_message_length": 64 << 20, "grpc.max_send_message_length": 64 << 20, **options}
    server = grpc.server(ThreadPoolExecutor(16), options=list(limits.items()))
    tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(servicer, server)
    if servicer.health is not None:
        health_pb2_grpc.add_HealthServicer_to_server(servicer.health, server)
    bound = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    servicer.target = f"{address.rpartition(':')[0]}:{bound}"
    server.start()
    try:
        yield server
    finally:
        servicer.gate.set()
        server.stop(None).wait()


@pytest.fixture
def tiny() -> Iterator[TinyServer]:
    """A tiny server with one codebook, `small`: 300 codes of 4 dimensions."""
    servicer = TinyServer(Codes("small"))
    with running(servicer):
        yield servicer


@pytest.fixture
def streaming() -> Iterator[StreamingServer]:
    """The same with streams: `streams` counts them, `singles` the calls that are none."""
    servicer = StreamingServer(Codes("small"))
    with running(servicer):
        yield servicer


@pytest.fixture
def serve_tiny() -> Iterator[Callable[..., TinyServer]]:
    """Start a tiny server of these codebooks, with gRPC options."""
    with contextlib.ExitStack() as stack:

        def start(*codes: Codes, **options: Any) -> TinyServer:
            servicer = TinyServer(*codes)
            stack.enter_context(running(servicer, **options))
            return servicer

        yield start


@pytest.fixture
def replicas() -> Iterator[Callable[..., list[StreamingServer]]]:
    """Start servers with health on these addresses of this machine and one port: replicas("127.0.0.1", "127.0.0.2")."""
    with contextlib.ExitStack() as stack:

        def start(*hosts: str, port: str = "0") -> list[StreamingServer]:
            servers = []
            for host in hosts:
                servers.append(StreamingServer(Codes("small")))
                servers[-1].health = health.HealthServicer(experimental_non_blocking=True)
                servers[-1].grpc_server = stack.enter_context(running(servers[-1], f"{host}:{port}"))
                port = servers[-1].target.rpartition(":")[2]
            return servers

        yield start


@pytest.fixture
def named() -> Iterator[Callable[..., NameServer]]:
    """Make a name with these addresses: named(*addresses) -> NameServer."""
    with contextlib.ExitStack() as stack:
        yield lambda *addresses: stack.enter_context(name_server(*addresses))


@pytest.fixture
def codes() -> type[Codes]:
    return Codes


class Awaited:
    """An AsyncClient with the face of a Client, on an event loop of its own."""

    def __init__(self, client: AsyncClient, loop: asyncio.AbstractEventLoop) -> None:
        self.client = client
        self._core = client._core
        self._loop = loop

    def encode(self, latents: Any, **options: Any) -> Any:
        return self._loop.run_until_complete(self.client.encode(latents, **options))

    def decode(self, indices: Any, **options: Any) -> Any:
        return self._loop.run_until_complete(self.client.decode(indices, **options))

    def codebooks(self, **options: Any) -> Any:
        return self._loop.run_until_complete(self.client.codebooks(**options))

    def server_info(self, **options: Any) -> Any:
        return self._loop.run_until_complete(self.client.server_info(**options))

    def close(self) -> None:
        self._loop.run_until_complete(self.client.close())

    def encode_many(self, items: Any, **options: Any) -> Iterator[Any]:
        return self._iterate(self.client.encode_many(items, **options))

    def decode_many(self, items: Any, **options: Any) -> Iterator[Any]:
        return self._iterate(self.client.decode_many(items, **options))

    def _iterate(self, answers: Any) -> Iterator[Any]:
        try:
            while True:
                try:
                    answer = self._loop.run_until_complete(anext(answers))
                except StopAsyncIteration:
                    return
                yield answer
        finally:
            self._loop.run_until_complete(answers.aclose())

    def __repr__(self) -> str:
        return repr(self.client)


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Make a client of either kind: connect(target, **options)."""
    made: list[Any] = []
    loop = asyncio.new_event_loop()

    def make(target: str, **options: Any) -> Any:
        client = Client(target, **options) if request.param == "sync" else Awaited(AsyncClient(target, **options), loop)
        made.append(client)
        return client

    yield make
    for client in made:
        client.close()
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


@pytest.fixture
def latents() -> Callable[..., np.ndarray]:
    """Make latents of a shape: latents(2, 4, 8, 8, dtype=np.float16)."""

    def make(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal(shape).astype(dtype)

    return make


def fail(code: str, details: str = "scripted", **metadata: str) -> Behaviour:
    def behave(request: Any, context: grpc.ServicerContext, honest: Callable[[], Any]) -> Any:
        context.set_trailing_metadata(tuple((key.replace("_", "-"), value) for key, value in metadata.items()))
        context.abort(getattr(grpc.StatusCode, code), details)

    return behave


@pytest.fixture
def failing() -> Callable[..., Behaviour]:
    """Make a behaviour that fails: failing("UNAVAILABLE", "text", vqserve_request_id="x")."""
    return fail


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send every array of encode_many in a request of its own, for tests that count or time requests."""
    monkeypatch.setattr("vqserve_client.pipeline.MOST_JOINED", 1)


@pytest.fixture
def lying() -> Callable[..., Behaviour]:
    """Make a behaviour that changes fields of the honest reply: lying(digest="0" * 64)."""

    def make(**fields: Any) -> Behaviour:
        def behave(request: Any, context: grpc.ServicerContext, honest: Callable[[], Any]) -> Any:
            reply = honest()
            for name, value in fields.items():
                reply.ClearField(name)
                if name == "shape":
                    reply.shape.extend(value)
                else:
                    setattr(reply, name, value)
            return reply

        return behave

    return make
