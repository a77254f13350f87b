"""What there is at the moment, and which codebooks are served: written to the metrics now and then."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from vqserve_server.device import reserved_bytes
from vqserve_server.engine import Engine
from vqserve_server.rpc import RpcServer
from vqserve_server.tokenizer import Tokenizer

# Seconds between two looks.
_INTERVAL_S = 1.0


class Gauges:
    """The gauges of one server. Belongs to one event loop; no request has to write them."""

    def __init__(self, engine: Engine, rpc: RpcServer) -> None:
        self._engine = engine
        self._rpc = rpc
        self._metrics = engine.metrics
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Write them from now on."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    def stop(self) -> None:
        """Write them no longer."""
        if self._task is not None:
            self._task.cancel()

    def publish(self, tokenizers: Sequence[Tokenizer]) -> None:
        """Say which codebooks are served."""
        for device in {tokenizer.device for tokenizer in tokenizers}:
            self._metrics.add("device_busy_seconds", 0, device=str(device))
        self._metrics.publish(
            {
                "codebook": tokenizer.info.name,
                "digest": tokenizer.info.digest,
                "kind": tokenizer.info.kind,
                "num_codes": str(tokenizer.info.num_codes),
                "code_dim": str(tokenizer.info.code_dim),
                "num_quantizers": str(tokenizer.info.num_quantizers),
                "search": tokenizer.search,
                "device": str(tokenizer.device),
            }
            for tokenizer in tokenizers
        )

    async def _run(self) -> None:
        while True:
            self._write()
            await asyncio.sleep(_INTERVAL_S)

    def _write(self) -> None:
        metrics, admission = self._metrics, self._engine.admission
        metrics.set("queue_requests", admission.requests)
        metrics.set("queue_rows", admission.rows)
        metrics.set("queue_bytes", admission.bytes)
        metrics.set("open_calls", self._rpc.open_calls)
        connections = self._rpc.connections
        if connections is not None:
            metrics.set("connections", connections)
        for device in {tokenizer.device for tokenizer in self._engine.live.tokenizers()}:
            nbytes = reserved_bytes(device)
            if nbytes is not None:
                metrics.set("device_memory_bytes", nbytes, device=str(device))
