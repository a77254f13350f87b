"""One server in one process: an engine, its gRPC server, and what it says about itself."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence

from vqserve.codebook_info import CodebookInfo
from vqserve.errors import StartError
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_server.access import Access
from vqserve_server.config import ServeConfig
from vqserve_server.engine import Engine
from vqserve_server.event_log import event
from vqserve_server.monitoring.gauges import Gauges
from vqserve_server.monitoring.instruments import Instruments
from vqserve_server.network import address, check_unix_socket
from vqserve_server.rpc import RpcServer
from vqserve_server.rpc.admin import Execute
from vqserve_server.tokenizer import Tokenizer

# An idle device thread needs a moment to end.
_IDLE_END_S = 0.5
# A broken server fails all requests at once. This is for sending those replies; callers try again meanwhile, in vain.
_BROKEN_DRAIN_S = 0.25

logger = logging.getLogger(__name__)


class App:
    """One server: an engine and its gRPC server. Call its methods from one event loop."""

    def __init__(
        self,
        tokenizers: Sequence[Tokenizer],
        config: ServeConfig | None = None,
        *,
        labels: Mapping[str, str] | None = None,
        access: Access | None = None,
        instruments: Instruments | None = None,
        shares_port: bool = False,
        on_broken: Callable[[], None] = lambda: None,
    ) -> None:
        """Make the server; nothing runs before `start`.

        Args:
            tokenizers: the codebooks to serve.
            config: all settings.
            labels: further names of the codebooks: {"book@stable": "book@3"}.
            access: certificates and tokens; None: those of the settings.
            instruments: count, sample and trace; None: nobody asks for it.
            shares_port: whether other processes listen on the port too.
            on_broken: called, from any thread, when the server can serve no longer.
        """
        self._config = config or ServeConfig()
        self._loop = asyncio.get_running_loop()
        self._loop_turns = 0
        self.broken = asyncio.Event()
        self._when_broken = on_broken
        instruments = instruments or Instruments()
        self.engine = Engine(
            tokenizers,
            self._config.engine,
            labels=labels,
            metrics=instruments.metrics,
            usage=instruments.usage,
            on_broken=self._on_broken,
        )
        self._access = access or Access(self._config.access)
        self._rpc = RpcServer(
            self.engine,
            self._config.rpc,
            self._access,
            health_port=self._config.access.health_port,
            tracing=instruments.tracing,
            shares_port=shares_port,
        )
        self._gauges = Gauges(self.engine, self._rpc)

    async def start(self) -> int:
        """Start, and return the port.

        Raises:
            StartError: the address cannot be bound.
        """
        if self._config.rpc.unix_socket:
            # Check again: gRPC replaces a socket file without a check, and another server may have started meanwhile.
            check_unix_socket(self._config.rpc.unix_socket)
        self._gauges.publish(self.engine.live.tokenizers())
        self._gauges.start()
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
        self._gauges.publish(tokenizers)
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
        self._gauges.stop()
        logger.info(event("served", **self.engine.stats.summary()))
        return finished and stopped

    def threads(self) -> Mapping[str, Callable[[], int]]:
        """Return the threads that a watchdog should check; see `Watchdog`."""
        return {**self._rpc.threads(), threading.current_thread().name: self._count_loop_turns}

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
