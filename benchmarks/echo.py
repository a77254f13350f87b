"""The floor of transport: a bare gRPC server that answers any request with a fixed number of bytes.

`python echo.py sync|aio|queue REPLY_BYTES` prints its port. Threads or an event loop: which is faster depends on the
size; the bare completion queue, which has no streams, is below both.
"""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0)]
ADDRESS = "127.0.0.1:0"


def with_threads(reply: bytes) -> None:
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: reply)
    server = grpc.server(ThreadPoolExecutor(4), options=OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Echo", {"Echo": handler}),))
    port = server.add_insecure_port(ADDRESS)
    server.start()
    print(port, flush=True)
    server.wait_for_termination()


async def with_a_loop(reply: bytes) -> None:
    async def echo(request: bytes, context: Any) -> bytes:
        return reply

    async def stream(requests: Any, context: Any) -> None:
        while isinstance(await context.read(), bytes):
            await context.write(reply)

    server = grpc.aio.server(options=OPTIONS)
    methods = {
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
        "Stream": grpc.stream_stream_rpc_method_handler(stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Echo", methods),))
    port = server.add_insecure_port(ADDRESS)
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


def with_a_queue(reply: bytes) -> None:
    queue = cygrpc.CompletionQueue()
    server = cygrpc.Server(OPTIONS, False)
    server.register_completion_queue(queue)
    port = server.add_http2_port(ADDRESS.encode(), None)
    server.start()
    print(port, flush=True)

    def on_call(event: Any) -> None:
        server.request_call(queue, queue, on_call)
        answer = (
            cygrpc.SendInitialMetadataOperation((), 0),
            cygrpc.SendMessageOperation(reply, 0),
            cygrpc.SendStatusFromServerOperation((), cygrpc.StatusCode.ok, b"", 0),
        )
        event.call.start_server_batch(
            (cygrpc.ReceiveMessageOperation(0),), lambda _: event.call.start_server_batch(answer, lambda _: None)
        )

    server.request_call(queue, queue, on_call)
    while True:
        event = queue.poll()
        event.tag(event)


if __name__ == "__main__":
    kind, size = sys.argv[1:]
    if kind == "sync":
        with_threads(bytes(int(size)))
    elif kind == "queue":
        with_a_queue(bytes(int(size)))
    else:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(with_a_loop(bytes(int(size))))
