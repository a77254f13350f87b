"""The gRPC server: the methods of TokenizerService, health, reflection, and the stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection, reflection_pb2

from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_server.config import RpcConfig
from vqserve_server.engine import Engine
from vqserve_server.network import address
from vqserve_server.rpc.headers import DecodeHeader, EncodeHeader, HeaderCache
from vqserve_server.rpc.health import Health
from vqserve_server.rpc.messages import codebook_message, parse
from vqserve_server.rpc.request import Requests, UnaryCall
from vqserve_server.rpc.stream import StreamCall
from vqserve_server.rpc.transport import Call, Handler, Transport


class Calls:
    """Makes the handlers of methods, and counts their open calls."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._changed = threading.Condition()
        self._active = 0
        self._streams: set[StreamCall] = set()
        self._is_draining = False

    def drain(self, seconds: float) -> bool:
        """End streams after the requests that they have received, and wait for all calls; return whether all ended."""
        with self._changed:
            self._is_draining = True
            streams = list(self._streams)
        for stream in streams:
            stream.drain()
        with self._changed:
            return self._changed.wait_for(lambda: not self._active, seconds)

    def unary(self, headers: HeaderCache[Any]) -> Handler:
        """Return the handler of a method with one request for the engine and one reply."""

        def handle(call: Call) -> None:
            with self._changed:
                self._active += 1
            UnaryCall(call, self._requests, headers, on_close=self._leave)

        return handle

    def stream(self, headers: HeaderCache[Any]) -> Handler:
        """Return the handler of a method with many requests for the engine and as many replies."""

        def handle(call: Call) -> None:
            stream = StreamCall(call, self._requests, headers, on_close=self._forget)
            with self._changed:
                self._active += 1
                self._streams.add(stream)
                is_draining = self._is_draining
            stream.start()
            # Otherwise the server would wait for a caller that sends nothing.
            if is_draining:
                stream.drain()

        return handle

    def plain(self, answer: Callable[[Call, bytes], bytes]) -> Handler:
        """Return the handler of a method whose request is answered at once."""

        def handle(call: Call) -> None:
            def received(raw: bytes) -> None:
                try:
                    reply = answer(call, raw)
                except Exception as error:
                    call.fail(error)
                else:
                    call.end(message=reply)

            with self._changed:
                self._active += 1
            call.on_close = self._leave
            call.receive(received)

        return handle

    def _forget(self, stream: StreamCall) -> None:
        with self._changed:
            self._streams.discard(stream)
        self._leave()

    def _leave(self) -> None:
        with self._changed:
            self._active -= 1
            if not self._active:
                self._changed.notify_all()


SERVICE = pb.DESCRIPTOR.services_by_name["TokenizerService"].full_name


class TokenizerService:
    """Answers calls with an engine."""

    def __init__(self, engine: Engine, *, max_message_bytes: int) -> None:
        self._engine = engine
        self._requests = Requests(engine)
        self._encode = HeaderCache(EncodeHeader, engine.live, max_message_bytes=max_message_bytes)
        self._decode = HeaderCache(DecodeHeader, engine.live, max_message_bytes=max_message_bytes)
        self.calls = Calls(self._requests)

    def use_live_set(self) -> None:
        """Serve the codebooks that the engine has live now; requests that were validated before keep theirs."""
        self._encode.use_live_set(self._engine.live)
        self._decode.use_live_set(self._engine.live)

    def handlers(self) -> Mapping[str, Handler]:
        """Return the handlers of all methods."""
        return {
            f"/{SERVICE}/Encode": self.calls.unary(self._encode),
            f"/{SERVICE}/Decode": self.calls.unary(self._decode),
            f"/{SERVICE}/EncodeStream": self.calls.stream(self._encode),
            f"/{SERVICE}/DecodeStream": self.calls.stream(self._decode),
            f"/{SERVICE}/ListCodebooks": self.calls.plain(self._list_codebooks),
        }

    def close(self) -> None:
        """End the threads."""
        self._requests.close()

    def _list_codebooks(self, call: Call, raw: bytes) -> bytes:
        """Return the served codebooks as a ListCodebooksResponse."""
        parse(pb.ListCodebooksRequest, raw)
        self._engine.admission.enter(call.caller, 0, len(raw))
        try:
            codebooks = [codebook_message(info) for info in self._engine.live.infos()]
            return pb.ListCodebooksResponse(codebooks=codebooks).SerializeToString()
        finally:
            self._engine.admission.leave(call.caller, 0, len(raw))


class Reflection:
    """Answers one question after another about some services."""

    def __init__(self, services: Iterable[str]) -> None:
        self._servicer = reflection.ReflectionServicer([*services, reflection.SERVICE_NAME])

    def handlers(self) -> Mapping[str, Handler]:
        """Return the handlers of all methods."""
        return {f"/{reflection.SERVICE_NAME}/ServerReflectionInfo": self._info}

    def _info(self, call: Call) -> None:
        def received(raw: bytes) -> None:
            try:
                question = parse(reflection_pb2.ServerReflectionRequest, raw)
                (answer,) = self._servicer.ServerReflectionInfo(iter([question]), None)
            except Exception as error:
                call.fail(error)
            else:
                call.send(answer.SerializeToString(), receive)

        def receive() -> None:
            call.receive(received, at_end=call.end)

        receive()


# Seconds for the calls of health and reflection to end, after all others have.
_LINGER_S = 0.5


class RpcServer:
    """Serves an engine on a port."""

    def __init__(self, engine: Engine, config: RpcConfig, *, shares_port: bool = False) -> None:
        self._config = config
        self._service = TokenizerService(engine, max_message_bytes=config.max_message_bytes)
        self._health = Health(("", SERVICE))
        self._transport = Transport(
            {
                **self._service.handlers(),
                **self._health.handlers(),
                **Reflection((SERVICE, health.SERVICE_NAME)).handlers(),
            },
            options=_options(config, shares_port=shares_port),
            max_calls=config.max_concurrent_rpcs,
            idle_s=config.idle_seconds,
        )

    def start(self) -> int:
        """Listen, and return the port.

        Raises:
            RuntimeError: the address cannot be bound.
        """
        if self._config.unix_socket:
            self._transport.listen(f"unix:{self._config.unix_socket}")
        port = self._transport.listen(address(self._config.host, self._config.port))
        self._health.set_serving(True)
        self._transport.start()
        return port

    def turns(self) -> int:
        """Return a number that grows at least once per second while the transport's thread is not stuck."""
        return self._transport.turns

    def use_live_set(self) -> None:
        """Serve the codebooks that the engine has live now."""
        self._service.use_live_set()

    def not_serving(self) -> None:
        """Report NOT_SERVING to health checks from now on. Any thread may call it."""
        self._health.set_serving(False)

    def stop(self, drain_seconds: float) -> bool:
        """Let the calls that are being answered finish, then close the port; return whether they finished in time."""
        finished = self._service.calls.drain(drain_seconds)
        self._health.close()
        self._transport.stop(_LINGER_S)
        self._service.close()
        return finished


def _options(config: RpcConfig, *, shares_port: bool) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        # Limits of calls that have arrived but were not accepted yet. By default gRPC cancels random calls above 1000.
        # With larger limits the server accepts each call, and rejects it with RESOURCE_EXHAUSTED if there are too many.
        ("grpc.server.max_pending_requests", 10_000),
        ("grpc.server.max_pending_requests_hard_limit", 20_000),
        # Two servers on one port are a mistake, unless they are workers of one.
        ("grpc.so_reuseport", int(shares_port)),
        # The server notices within 90 seconds that a caller's machine is gone, and drops its requests. (The option
        # keepalive_timeout_ms has no effect: gRPC waits for the answer as for any other ping.)
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.http2.ping_timeout_ms", 20_000),
        # Callers may send pings every ten seconds, also between requests; gRPC disconnects those that send more.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]
