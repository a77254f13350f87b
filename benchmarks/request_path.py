"""What a small request costs in the server's Python, step by step, without gRPC and without a change of threads.

    python benchmarks/request_path.py [--requests 1 4 32] [--rounds 300]

gRPC's calls are replaced by objects that hand over a message and drop the reply; everything else is the server's own.
Each figure is the least of many rounds, in microseconds a request, so that other work on the machine matters little:
compare two checkouts with it. benchmarks/serving.py measures the whole.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from vqserve.trace import SERVICE_NAME
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_server.codebooks import save_codebook
from vqserve_server.config import ServeConfig
from vqserve_server.engine import Engine
from vqserve_server.engine.batch import Staging
from vqserve_server.metrics.memory import private_part
from vqserve_server.quantizers import VectorQuantizer
from vqserve_server.rpc.server import TokenizerService
from vqserve_server.rpc.server_info import ServerInfo
from vqserve_server.rpc.transport import Transport
from vqserve_server.tokenizer import Tokenizer
from vqserve_server.usage.live import LiveUsage
from vqserve_server.usage.memory import USAGE_BYTES

STEPS = ("call", "message", "take", "batch", "close")
TOKENS, CHANNELS, CODES = 16, 4, 16


class FakeCall:
    """A call of gRPC that keeps what it is to be told."""

    closed: Callable[[Any], None]
    receive: Callable[[Any], None]

    def peer(self) -> bytes:
        """Return the other side."""
        return b"ipv4:127.0.0.1:4242"

    def start_server_batch(self, operations: Any, tag: Callable[[Any], None] | None) -> None:
        """Keep what is called at the end and with the message; a reply needs nothing."""
        if tag is None:
            return
        if isinstance(operations[0], cygrpc.ReceiveCloseOnServerOperation):
            self.closed = tag
        elif isinstance(operations[0], cygrpc.ReceiveMessageOperation):
            self.receive = tag


class RequestPath:
    """The server's own part of the way of a request."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        usage = LiveUsage(private_part(USAGE_BYTES), one_in=ServeConfig().metrics.sample_one_in)
        self._engine = Engine([tokenizer], usage=usage)
        self._sampler = usage.sampler()
        info = ServerInfo(self._engine, lambda: 0)
        service = TokenizerService(self._engine, info, max_message_bytes=64 << 20)
        self._transport = Transport(service.handlers(), options=[], max_calls=1 << 20)
        # Nobody listens, so nobody asks for the next call.
        self._transport._server = SimpleNamespace(request_call=lambda *_: None)
        self._staging = Staging()

    def seconds(self, method: str, message: bytes, requests: int) -> list[float]:
        """Return how long each of the steps took for that many requests at once."""
        calls = [FakeCall() for _ in range(requests)]
        details = SimpleNamespace(method=f"/{SERVICE_NAME}/{method}".encode(), deadline=time.time() + 3600)
        metadata = (("user-agent", "benchmark"),)
        events = [
            SimpleNamespace(call=call, call_details=details, invocation_metadata=metadata, success=True)
            for call in calls
        ]
        received = SimpleNamespace(batch_operations=[SimpleNamespace(message=lambda: message)])
        times = [time.perf_counter()]
        for event in events:
            self._transport._on_call(event)
        times.append(time.perf_counter())
        for call in calls:
            call.receive(received)
        times.append(time.perf_counter())
        took, left = [0.0, 0.0], requests
        while left:
            start = time.perf_counter()
            batch = self._engine.scheduler.next_batch("benchmark")
            taken = time.perf_counter()
            assert batch is not None
            left -= len(batch.parts)
            self._engine._worker._serve(batch, self._staging, self._sampler)
            took[0] += taken - start
            took[1] += time.perf_counter() - taken
        times.append(time.perf_counter())
        for call in calls:
            call.closed(None)
        times.append(time.perf_counter())
        called, received_by, _, closed = (end - start for start, end in pairwise(times))
        return [called, received_by, *took, closed]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4, 32], help="requests in a batch")
    parser.add_argument("--rounds", type=int, default=300)
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        save_codebook(VectorQuantizer(CODES, CHANNELS), Path(folder) / "book.safetensors")
        path = RequestPath(Tokenizer.load(Path(folder) / "book.safetensors", device="cpu"))
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((1, TOKENS, CHANNELS), np.float32)
    indices = rng.integers(0, CODES, (1, TOKENS), np.int32)
    encode = pb.EncodeRequest(dtype=pb.DTYPE_FLOAT32, shape=latents.shape, latents=latents.tobytes())
    decode = pb.DecodeRequest(dtype=pb.DTYPE_INT32, shape=indices.shape, indices=indices.tobytes())
    print(f"{'':8} {'requests':>8} " + " ".join(f"{step:>8}" for step in (*STEPS, "sum")) + "  us a request")
    gc.disable()
    for count in args.requests:
        for method, message in (("Encode", encode), ("Decode", decode)):
            raw = message.SerializeToString()
            rounds = [path.seconds(method, raw, count) for _ in range(args.rounds)]
            best = [min(times) / count * 1e6 for times in zip(*rounds, strict=True)]
            print(f"{method:8} {count:8} " + " ".join(f"{each:8.2f}" for each in (*best, sum(best))))


if __name__ == "__main__":
    main()
