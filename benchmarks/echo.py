"""The floor of transport: a bare gRPC server that answers any request with a fixed number of bytes.

`python echo.py sync|aio REPLY_BYTES` prints its port. Threads or an event loop: which is faster depends on the size.
"""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

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


if __name__ == "__main__":
    kind, size = sys.argv[1:]
    if kind == "sync":
        with_threads(bytes(int(size)))
    else:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(with_a_loop(bytes(int(size))))
