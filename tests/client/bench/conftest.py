"""Servers to put load on: one of ours, in a process of its own, and one that knows nothing of vqserve."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from vqserve_bench import Schedule

# Three windows, if nothing stops it before; no test waits for stability.
QUICK = Schedule(warmup_s=0.1, window_s=0.1, max_windows=3, stability=1e-9)


@pytest.fixture
def quick() -> Schedule:
    return QUICK


@pytest.fixture(scope="session")
def real() -> Iterator[str]:
    """The target of a daemon with the demo codebook; gRPC's asyncio cannot be server and client of one process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "vqserve_tools", "serve", "--port", "0", "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().removeprefix("vqserved: ready on ").partition(",")[0]
    finally:
        process.terminate()
        process.communicate()


class Echo:
    """Echoes requests, as calls and over streams; a test can make it fail or hang."""

    call = "/test.Echo/Call"
    stream = "/test.Echo/Stream"

    def __init__(self) -> None:
        self.target = ""
        self.bodies: list[bytes] = []
        self.peers: set[str] = set()
        self.streams = 0
        self.fail_every = 0
        self.fail_after: int | None = None
        self.hang_after: int | None = None
        self.released = threading.Event()

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        if details.method == self.call:
            return grpc.unary_unary_rpc_method_handler(self._answer)
        if details.method == self.stream:
            return grpc.stream_stream_rpc_method_handler(self._answer_all)
        return None

    def _answer(self, body: bytes, context: grpc.ServicerContext) -> bytes:
        self.bodies.append(body)
        self.peers.add(context.peer())
        count = len(self.bodies)
        failing = self.fail_every and count % self.fail_every == 0
        if failing or (self.fail_after is not None and count > self.fail_after):
            context.abort(grpc.StatusCode.INTERNAL, "every so often it fails")
        if self.hang_after is not None and count > self.hang_after:
            self.released.wait()
        return body

    def _answer_all(self, bodies: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        self.streams += 1
        for body in bodies:
            yield self._answer(body, context)


@pytest.fixture
def echo() -> Iterator[Echo]:
    servicer = Echo()
    server = grpc.server(ThreadPoolExecutor(16))
    handler: Any = type("Handler", (grpc.GenericRpcHandler,), {"service": staticmethod(servicer.service)})()
    server.add_generic_rpc_handlers((handler,))
    servicer.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield servicer
    servicer.released.set()
    server.stop(None).wait()


@pytest.fixture
def window() -> Callable[..., Any]:
    """Make a window of one second: window(latencies in s, errors={...})."""
    import numpy as np  # noqa: PLC0415

    from vqserve_bench.window import Window  # noqa: PLC0415

    def make(*latencies_s: float, seconds: float = 1.0, **fields: Any) -> Window:
        return Window(seconds, np.array(latencies_s), **fields)

    return make
