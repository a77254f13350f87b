"""The daemon: connects codebooks, engine, gRPC server and signals."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Sequence

from vqserve.errors import StartError
from vqserve_server import console, grpcio_release, signals, stderr
from vqserve_server.codebook_files import find_codebooks
from vqserve_server.config import ServeConfig
from vqserve_server.console import event
from vqserve_server.engine import Engine
from vqserve_server.network import address, check, check_unix_socket, warn_if_open
from vqserve_server.repository import Reloader, Repository
from vqserve_server.rpc import RpcServer
from vqserve_server.tokenizer import Tokenizer

# An idle device thread needs a moment to end.
_IDLE_END_S = 0.5

logger = logging.getLogger(__name__)


class App:
    """One server: an engine and its gRPC server. Call its methods from one event loop."""

    def __init__(
        self, tokenizers: Sequence[Tokenizer], config: ServeConfig | None = None, *, shares_port: bool = False
    ) -> None:
        """Make the server; nothing runs before `start`.

        Args:
            tokenizers: the codebooks to serve.
            config: all settings.
            shares_port: whether other processes listen on the port too.
        """
        self._config = config or ServeConfig()
        self._loop = asyncio.get_running_loop()
        self.broken = asyncio.Event()
        self.engine = Engine(
            tokenizers,
            self._config.engine,
            on_broken=self._on_broken,
        )
        self._rpc = RpcServer(self.engine, self._config.rpc, shares_port=shares_port)

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
            rpc = self._config.rpc
            raise StartError(f"cannot listen on {address(rpc.host, rpc.port)}") from None
        if self._config.rpc.unix_socket:
            logger.info(event("listening", address=f"unix:{self._config.rpc.unix_socket}"))
        return port

    def swap(self, tokenizers: Sequence[Tokenizer]) -> None:
        """Serve these codebooks from now on; a request that arrived before uses only the old ones."""
        self.engine.swap(tokenizers)
        self._rpc.use_live_set()

    async def stop(self) -> bool:
        """Accept no more requests, answer the accepted ones, and stop; return whether all were answered in time."""
        deadline = self._loop.time() + self._config.drain_seconds
        self._rpc.not_serving()
        self.engine.drain()
        finished = await asyncio.to_thread(self._rpc.stop, self._config.drain_seconds)
        left_s = max(deadline - self._loop.time(), _IDLE_END_S)
        stopped = await asyncio.to_thread(self.engine.stop, left_s)
        logger.info(event("served", **self.engine.stats.summary()))
        return finished and stopped

    def _on_broken(self) -> None:
        def stop_serving() -> None:
            self._rpc.not_serving()
            self.broken.set()

        self._loop.call_soon_threadsafe(stop_serving)


async def serve(repository: Repository, config: ServeConfig, *, worker: int | None = None) -> int:
    """Serve until a stop signal arrives or the device is lost; return the exit code.

    SIGHUP reloads the repository. A SIGHUP during the start is handled when the server is ready.
    """
    app = App(repository.tokenizers, config, shares_port=worker is not None)
    reloader = Reloader(repository, lambda: app.swap(repository.tokenizers))
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
    _announce(repository.tokenizers, config.rpc.host, port)
    done, pending = await asyncio.wait(
        [asyncio.create_task(stop.wait()), asyncio.create_task(app.broken.wait())],
        return_when=asyncio.FIRST_COMPLETED,
    )
    del done
    for task in pending:
        task.cancel()
    in_time = await app.stop()
    code = 1 if app.broken.is_set() else 0
    if not in_time:
        logger.warning(event("drain_expired", drain_seconds=config.drain_seconds))
    if not in_time or reloader.is_busy:
        # A thread that computes cannot be stopped, and the interpreter may crash if it exits meanwhile.
        _exit_now(code)
    return code


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
        check(config.rpc.host, config.rpc.port)
        if config.rpc.unix_socket:
            check_unix_socket(config.rpc.unix_socket)
        warn_if_open(config.rpc.host)
    repository = Repository(sources, device=config.device, search=config.search)
    repository.load()
    # The present objects stay alive; a collection after a swap can skip them.
    gc.freeze()
    code = asyncio.run(serve(repository, config, worker=worker))
    if code:
        raise StartError("the device failed; the log has the reason")
    return code


def _announce(tokenizers: Sequence[Tokenizer], host: str, port: int) -> None:
    count = f"{len(tokenizers)} codebook{'' if len(tokenizers) == 1 else 's'}"
    devices = ", ".join(sorted({str(tokenizer.device) for tokenizer in tokenizers}))
    sys.stdout.write(f"vqserved: ready on {address(host, port)}, {count}, {devices}\n")
    sys.stdout.flush()


def _exit_now(code: int) -> None:
    sys.stdout.flush()
    stderr.drain()
    os._exit(code)
