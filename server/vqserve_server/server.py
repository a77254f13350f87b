"""One server in one process: an engine, its gRPC server, and what it says about itself."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from vqserve.codebook_info import CodebookInfo
from vqserve.errors import StartError
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_server.access import Access
from vqserve_server.config import ServeConfig
from vqserve_server.console import event
from vqserve_server.device import reserved_bytes
from vqserve_server.engine import Engine
from vqserve_server.metrics.recorder import Metrics
from vqserve_server.network import address, check_unix_socket
from vqserve_server.rpc import RpcServer
from vqserve_server.rpc.admin import Execute
from vqserve_server.search import SearchCounts
from vqserve_server.tokenizer import Tokenizer
from vqserve_server.usage.live import LiveUsage

if TYPE_CHECKING:
    from vqserve_server.rpc.tracing import Tracing

# An idle device thread needs a moment to end.
_IDLE_END_S = 0.5
# A broken server fails all requests at once. This is for sending those replies; callers try again meanwhile, in vain.
_BROKEN_DRAIN_S = 0.25
# Seconds between two looks at what there is at the moment.
_SAMPLE_S = 1.0

logger = logging.getLogger(__name__)


class LiveCounts(SearchCounts):
    """Counts the searches of one codebook in the metrics."""

    def __init__(self, metrics: Metrics, codebook: str) -> None:
        super().__init__()
        self._metrics = metrics
        self._codebook = codebook
        metrics.add("rechecked_rows", 0, codebook=codebook)

    def add(self, *, rows: int = 0, rechecked: int = 0, arbitrated: int = 0) -> None:
        """Count the rows that the fast search left open: few batches have any."""
        del rows, arbitrated
        if rechecked:
            self._metrics.add("rechecked_rows", rechecked, codebook=self._codebook)


class App:
    """One server: an engine and its gRPC server. Call its methods from one event loop."""

    def __init__(
        self,
        tokenizers: Sequence[Tokenizer],
        config: ServeConfig | None = None,
        *,
        labels: Mapping[str, str] | None = None,
        access: Access | None = None,
        metrics: Metrics | None = None,
        tracing: Tracing | None = None,
        usage: LiveUsage | None = None,
        shares_port: bool = False,
        on_broken: Callable[[], None] = lambda: None,
    ) -> None:
        """Make the server; nothing runs before `start`.

        Args:
            tokenizers: the codebooks to serve.
            config: all settings.
            labels: further names of the codebooks: {"book@stable": "book@3"}.
            access: certificates and tokens; None: those of the settings.
            metrics: counts what the server does; None: nobody reads them.
            tracing: makes spans of requests; None: there are none.
            usage: samples the rows that are encoded; None: nobody reads what it counts.
            shares_port: whether other processes listen on the port too.
            on_broken: called, from any thread, when the server can serve no longer.
        """
        self._config = config or ServeConfig()
        self._loop = asyncio.get_running_loop()
        self._loop_turns = 0
        self.broken = asyncio.Event()
        self._when_broken = on_broken
        self._sampling: asyncio.Task[None] | None = None
        self.engine = Engine(
            tokenizers,
            self._config.engine,
            labels=labels,
            metrics=metrics,
            usage=usage,
            on_broken=self._on_broken,
        )
        self._access = access or Access(self._config.access)
        self._rpc = RpcServer(
            self.engine,
            self._config.rpc,
            self._access,
            health_port=self._config.access.health_port,
            tracing=tracing,
            shares_port=shares_port,
        )

    async def start(self) -> int:
        """Start, and return the port.

        Raises:
            StartError: the address cannot be bound.
        """
        if self._config.rpc.unix_socket:
            # Check again: gRPC replaces a socket file without a check, and another server may have started meanwhile.
            check_unix_socket(self._config.rpc.unix_socket)
        self._publish(self.engine.live.tokenizers())
        self._sampling = self._loop.create_task(self._sample_forever())
        self.engine.start()
        try:
            port = self._rpc.start()
        except RuntimeError:
            rpc, health = self._config.rpc, self._config.access.health_port
            beside = f", or on port {health}" if health else ""
            raise StartError(f"cannot listen on {address(rpc.host, rpc.port)}{beside}") from None
        if self._config.rpc.unix_socket:
            logger.info(event("listening", address=f"unix:{self._config.rpc.unix_socket}"))
        return port

    def swap(self, tokenizers: Sequence[Tokenizer], labels: Mapping[str, str] | None = None) -> None:
        """Serve these codebooks from now on; a request that arrived before uses only the old ones."""
        self.engine.swap(tokenizers, labels)
        self._publish(tokenizers)
        self._rpc.use_live_set()

    def refresh_access(self) -> list[str]:
        """Read certificates and tokens that have changed now, not at their next use; return why some are not used."""
        return self._access.refresh()

    def info(self) -> pb.ServerInfo:
        """Return version, uptime and load."""
        return self._rpc.info()

    def codebooks(self) -> list[CodebookInfo]:
        """Return what is served, under each name."""
        return self.engine.live.infos()

    def administer_with(self, execute: Execute) -> None:
        """Let that function execute what callers of AdminService ask."""
        self._rpc.administer_with(execute)

    async def stop(self) -> bool:
        """Accept no more requests, answer the accepted ones, and stop; return whether all were answered in time."""
        drain_s = min(self._config.drain_seconds, _BROKEN_DRAIN_S if self.broken.is_set() else math.inf)
        deadline = self._loop.time() + drain_s
        self._rpc.not_serving()
        # The engine serves on: a call that was accepted may still send its request.
        finished = await asyncio.to_thread(self._rpc.stop, drain_s)
        left_s = max(deadline - self._loop.time(), _IDLE_END_S)
        stopped = await asyncio.to_thread(self.engine.stop, left_s)
        if self._sampling is not None:
            self._sampling.cancel()
        logger.info(event("served", **self.engine.stats.summary()))
        return finished and stopped

    def threads(self) -> Mapping[str, Callable[[], int]]:
        """Return the threads that a watchdog should check; see `Watchdog`."""
        return {**self._rpc.threads(), threading.current_thread().name: self._count_loop_turns}

    def _publish(self, tokenizers: Sequence[Tokenizer]) -> None:
        """Say in the metrics which codebooks are served."""
        for device in {tokenizer.device for tokenizer in tokenizers}:
            self.engine.metrics.add("device_busy_seconds", 0, device=str(device))
        self.engine.metrics.publish(
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

    async def _sample_forever(self) -> None:
        """Write now and then what there is at the moment to the metrics: no request has to."""
        while True:
            self._sample()
            await asyncio.sleep(_SAMPLE_S)

    def _sample(self) -> None:
        metrics, admission = self.engine.metrics, self.engine.admission
        metrics.set("queue_requests", admission.requests)
        metrics.set("queue_rows", admission.rows)
        metrics.set("queue_bytes", admission.bytes)
        metrics.set("open_calls", self._rpc.open_calls)
        connections = self._rpc.connections
        if connections is not None:
            metrics.set("connections", connections)
        for device in {tokenizer.device for tokenizer in self.engine.live.tokenizers()}:
            nbytes = reserved_bytes(device)
            if nbytes is not None:
                metrics.set("device_memory_bytes", nbytes, device=str(device))

    def _count_loop_turns(self) -> int:
        """Return a number that grows if the loop has run since the last call."""

        def count() -> None:
            self._loop_turns += 1

        self._loop.call_soon_threadsafe(count)
        return self._loop_turns

    def _on_broken(self) -> None:
        # First: what is stuck may hold a lock that the others need.
        self._when_broken()
        # Not on the loop, which may be what is stuck.
        self._rpc.not_serving()
        # The loop is closed after the stop.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.broken.set)
