"""The daemon: connects codebooks, engine, gRPC server and signals."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TextIO

from vqserve.errors import StartError
from vqserve_server import console, grpcio_release, signals, stderr
from vqserve_server.access import Access
from vqserve_server.codebook_files import find_codebooks
from vqserve_server.config import ServeConfig
from vqserve_server.console import event
from vqserve_server.engine import Engine, Watchdog
from vqserve_server.heartbeat import Heartbeat
from vqserve_server.metrics.memory import inherited_part, private_part
from vqserve_server.metrics.port import MetricsPort
from vqserve_server.metrics.present import Processes
from vqserve_server.metrics.recorder import Metrics
from vqserve_server.metrics.store import METRICS, NBYTES
from vqserve_server.network import address, check, check_protected, check_unix_socket
from vqserve_server.process import allow_connections
from vqserve_server.repository import Reloader, Repository
from vqserve_server.rescan import Rescan
from vqserve_server.rpc import RpcServer
from vqserve_server.tokenizer import Tokenizer

# An idle device thread needs a moment to end.
_IDLE_END_S = 0.5
# A broken server fails all requests at once. This is for sending those replies; callers try again meanwhile, in vain.
_BROKEN_DRAIN_S = 0.25
# Whatever is stuck, a broken process has ended after so many seconds.
_BROKEN_END_S = 5.0

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
        metrics: Metrics | None = None,
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
            shares_port: whether other processes listen on the port too.
            on_broken: called, from any thread, when the server can serve no longer.
        """
        self._config = config or ServeConfig()
        self._loop = asyncio.get_running_loop()
        self._loop_turns = 0
        self.broken = asyncio.Event()
        self._when_broken = on_broken
        self.engine = Engine(
            tokenizers,
            self._config.engine,
            labels=labels,
            metrics=metrics,
            on_broken=self._on_broken,
        )
        self._access = access or Access(self._config.access)
        self._rpc = RpcServer(
            self.engine,
            self._config.rpc,
            self._access,
            health_port=self._config.access.health_port,
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
        self._rpc.use_live_set()

    def refresh_access(self) -> None:
        """Read certificates and tokens again that have changed; they are also read at their next use."""
        self._access.refresh()

    async def stop(self) -> bool:
        """Accept no more requests, answer the accepted ones, and stop; return whether all were answered in time."""
        drain_s = min(self._config.drain_seconds, _BROKEN_DRAIN_S if self.broken.is_set() else math.inf)
        deadline = self._loop.time() + drain_s
        self._rpc.not_serving()
        # The engine serves on: a call that was accepted may still send its request.
        finished = await asyncio.to_thread(self._rpc.stop, drain_s)
        left_s = max(deadline - self._loop.time(), _IDLE_END_S)
        stopped = await asyncio.to_thread(self.engine.stop, left_s)
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


async def serve(
    repository: Repository,
    config: ServeConfig,
    access: Access | None = None,
    *,
    metrics: Metrics | None = None,
    processes: Processes | None = None,
    worker: int | None = None,
    heartbeat: Heartbeat | None = None,
    rescan: Rescan | None = None,
    on_broken: Callable[[], None] = lambda: None,
) -> int:
    """Serve until a stop signal arrives; return the exit code. A fault of the device ends the process with 1.

    SIGHUP reloads the repository. A SIGHUP during the start is handled when the server is ready.
    """
    app = App(
        repository.tokenizers,
        config,
        labels=repository.labels,
        access=access,
        metrics=metrics,
        shares_port=worker is not None,
        on_broken=on_broken,
    )
    watchdog = _watchdog(app, config, heartbeat)
    reloader = Reloader(repository, lambda: app.swap(repository.tokenizers, repository.labels))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if stop.is_set():
            # Process 1 of a container ignores signals by default, so exit here.
            _exit_now(128 + number)
        logger.info(event("stopping", signal=signal.Signals(number).name))
        stop.set()

    def on_reload() -> None:
        if not stop.is_set():
            app.refresh_access()
            reloader.request()

    def on_orphaned() -> None:
        # Remove the reader, because a pipe at its end stays readable.
        loop.remove_reader(sys.stdin.fileno())
        logger.info(event("stopping", reason="the parent process has ended"))
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    signals.on_sighup(loop, on_reload)
    if worker is not None:
        # The parent's end of the pipe closes when the parent ends.
        loop.add_reader(sys.stdin.fileno(), on_orphaned)
    port = await app.start()
    if watchdog is not None:
        watchdog.start()
    if processes is not None:
        processes.ready.add(worker or 0)
    _announce(repository.tokenizers, config.rpc.host, port)
    looking = None if rescan is None else asyncio.create_task(rescan.run(on_reload))
    done, pending = await asyncio.wait(
        [asyncio.create_task(stop.wait()), asyncio.create_task(app.broken.wait())],
        return_when=asyncio.FIRST_COMPLETED,
    )
    del done
    for task in (*pending, *([] if looking is None else [looking])):
        task.cancel()
    if watchdog is not None:
        watchdog.stop()
    if heartbeat is not None:
        heartbeat.close()
    in_time = await app.stop()
    if app.broken.is_set():
        sys.stderr.write("vqserved: error: the device failed; the log has the reason\n")
        _exit_now(1)
    if not in_time:
        logger.warning(event("drain_expired", drain_seconds=config.drain_seconds))
    if not in_time or reloader.is_busy:
        # A thread that computes cannot be stopped, and the interpreter may crash if it exits meanwhile.
        _exit_now(0)
    return 0


def run(sources: Sequence[str], config: ServeConfig, *, worker: int | None = None) -> int:
    """Load codebooks and serve them; return the exit code.

    Args:
        sources: files, folders, NAME=FILE; if empty, the demo codebook.
        config: all settings.
        worker: number of this process among several that share the port; None if it is the only one.

    Raises:
        VqserveError: the daemon cannot start.
    """
    console.set_up(config.log_level, worker=worker)
    if worker is None:
        grpcio_release.warn_if_untested()
    find_codebooks(sources).check()
    if worker is None:
        check_protected(config.rpc.host, config.access)
        check(config.rpc.host, config.rpc.port)
        if config.access.health_port:
            check(config.rpc.host, config.access.health_port, flag="--health-port")
        if config.rpc.unix_socket:
            check_unix_socket(config.rpc.unix_socket)
    allow_connections(config.rpc.max_connections)
    access = Access(config.access)
    memory = inherited_part(METRICS, os.environ)
    if memory is None:
        memory = private_part(NBYTES)
    metrics, processes = Metrics(memory), Processes(pids={0: os.getpid()})
    heartbeat = None if worker is None else Heartbeat.of(os.environ)
    with contextlib.ExitStack() as stack:
        if worker is None:
            # Before the codebooks are loaded, which may take minutes.
            stack.enter_context(MetricsPort(config, access, processes, [memory]))
        nowhere = stack.enter_context(open(os.devnull, "w"))  # noqa: PTH123
        rescan = Rescan(sources, config.rescan_seconds)
        repository = Repository(sources, device=config.device, search=config.search)
        repository.load()
        # The present objects stay alive; a collection after a swap can skip them.
        gc.freeze()
        serving = serve(
            repository,
            config,
            access,
            metrics=metrics,
            processes=processes,
            worker=worker,
            heartbeat=heartbeat,
            rescan=rescan,
            on_broken=partial(_end_in_any_case, nowhere),
        )
        return asyncio.run(serving)


def _watchdog(app: App, config: ServeConfig, heartbeat: Heartbeat | None) -> Watchdog | None:
    if not config.watchdog_seconds:
        return None
    # A batch that is not full may wait on purpose.
    seconds = config.watchdog_seconds + config.engine.max_wait_us * 1e-6
    on_alive = _nothing if heartbeat is None else heartbeat.beat
    return Watchdog(app.engine, seconds, threads=app.threads(), on_alive=on_alive)


def _nothing() -> None:
    pass


def _end_in_any_case(nowhere: TextIO) -> None:
    """End the process in a few seconds, also if no thread can run Python code by then."""
    # Traces of all threads go nowhere: stderr may be a pipe that nobody reads.
    faulthandler.dump_traceback_later(_BROKEN_END_S, exit=True, file=nowhere)


def _announce(tokenizers: Sequence[Tokenizer], host: str, port: int) -> None:
    count = f"{len(tokenizers)} codebook{'' if len(tokenizers) == 1 else 's'}"
    devices = ", ".join(sorted({str(tokenizer.device) for tokenizer in tokenizers}))
    sys.stdout.write(f"vqserved: ready on {address(host, port)}, {count}, {devices}\n")
    sys.stdout.flush()


def _exit_now(code: int) -> None:
    sys.stdout.flush()
    stderr.drain()
    os._exit(code)
