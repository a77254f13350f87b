"""The daemon: one process from its start to its end, with its codebooks, server and signals."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TextIO

from vqserve_server import event_log, grpcio_release, signals, systemd
from vqserve_server.access import Access
from vqserve_server.administration import Administration
from vqserve_server.codebook_files import find_codebooks
from vqserve_server.config import ServeConfig
from vqserve_server.control import Control
from vqserve_server.engine import Watchdog
from vqserve_server.event_log import event
from vqserve_server.heartbeat import Heartbeat
from vqserve_server.monitoring.instruments import ProcessInstruments
from vqserve_server.network import address, check, check_protected, check_unix_socket
from vqserve_server.process import allow_connections
from vqserve_server.repository import RELOAD_RESULTS, Reloader, Repository
from vqserve_server.rescan import Rescan
from vqserve_server.server import App
from vqserve_server.stopping import Stop, exit_now
from vqserve_server.tokenizer import Tokenizer

# Whatever is stuck, a broken process has ended after so many seconds.
_BROKEN_END_S = 5.0

logger = logging.getLogger(__name__)


async def serve(
    repository: Repository,
    config: ServeConfig,
    access: Access | None = None,
    *,
    own: ProcessInstruments,
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
        instruments=own.instruments,
        shares_port=worker is not None,
        on_broken=on_broken,
    )
    watchdog = _watchdog(app, config, heartbeat)
    # From the start, because a rate or an increase does not see the value with which a series begins.
    for result in RELOAD_RESULTS:
        app.engine.metrics.add("reloads", 0, result=result)
    reloader = Reloader(
        repository,
        lambda: app.swap(repository.tokenizers, repository.labels),
        on_result=lambda result: app.engine.metrics.add("reloads", result=result),
    )
    loop = asyncio.get_running_loop()
    stop = Stop()

    def on_reload() -> None:
        if not stop.requested.is_set():
            app.refresh_access()
            systemd.reloading()
            reloader.request().add_done_callback(on_reloaded)

    def on_reloaded(_: object) -> None:
        if not stop.requested.is_set():
            systemd.ready("serving")

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.on_signal, number)
    signals.on_sighup(loop, on_reload)
    if worker is not None:
        # The parent's end of the pipe closes when the parent ends.
        loop.add_reader(sys.stdin.fileno(), stop.on_orphaned)
    administration = Administration(
        server=app,
        reload=reloader.request,
        drain=partial(stop.request, "an operator's call"),
        drain_seconds=config.drain_seconds,
    )
    administration.parent = Control.of(os.environ, administration.execute)
    beside = [] if administration.parent is None else [asyncio.create_task(administration.parent.run())]
    app.administer_with(partial(administration.request, loop=loop))
    port = await app.start()
    if watchdog is not None:
        watchdog.start()
    own.processes.ready.add(worker or 0)
    _announce(repository.tokenizers, config.rpc.host, port)
    systemd.ready("serving")
    beside.append(asyncio.create_task(systemd.keep_alive()))
    if rescan is not None:
        beside.append(asyncio.create_task(rescan.run(on_reload)))
    ends = [asyncio.create_task(stop.requested.wait()), asyncio.create_task(app.broken.wait())]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    systemd.stopping()
    if watchdog is not None:
        watchdog.stop()
    if heartbeat is not None:
        heartbeat.close()
    in_time = await app.stop()
    for task in (*ends, *beside):
        task.cancel()
    if app.broken.is_set():
        sys.stderr.write("vqserved: error: the device failed; the log has the reason\n")
        exit_now(1)
    if not in_time:
        logger.warning(event("drain_expired", drain_seconds=config.drain_seconds))
    if not in_time or reloader.is_busy:
        # A thread that computes cannot be stopped, and the interpreter may crash if it exits meanwhile.
        exit_now(0)
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
    event_log.set_up(config.log_level, form=config.log_format, worker=worker)
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
    heartbeat = None if worker is None else Heartbeat.of(os.environ)
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(contextlib.closing(ProcessInstruments(config, os.environ, worker=worker)))
        if worker is None:
            # Before the codebooks are loaded, which may take minutes.
            stack.enter_context(own.port(access))
        nowhere = stack.enter_context(open(os.devnull, "w"))  # noqa: PTH123
        rescan = Rescan(sources, config.rescan_seconds)
        repository = Repository(sources, device=config.device, search=config.search, counts_of=own.search_counts)
        repository.load()
        # The present objects stay alive; a collection after a swap can skip them.
        gc.freeze()
        serving = serve(
            repository,
            config,
            access,
            own=own,
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
