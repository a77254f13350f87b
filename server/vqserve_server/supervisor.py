"""The parent of several workers that serve one port: its start, its signals and its end; see `workers`."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from typing import Any

from vqserve_server import event_log, grpcio_release, signals, systemd
from vqserve_server.access import Access
from vqserve_server.codebook_files import find_codebooks
from vqserve_server.config import ServeConfig
from vqserve_server.control import (
    RELOAD,
)
from vqserve_server.event_log import event
from vqserve_server.metrics.memory import SharedMemory
from vqserve_server.metrics.present import Processes
from vqserve_server.metrics.store import METRICS, NBYTES
from vqserve_server.monitoring.port import metrics_port
from vqserve_server.network import check_protected, reserve
from vqserve_server.rescan import Rescan
from vqserve_server.usage.memory import USAGE, USAGE_BYTES
from vqserve_server.workers import Workers

logger = logging.getLogger(__name__)


async def serve(workers: Workers, config: ServeConfig, rescan: Rescan) -> int:
    """Run the workers until a stop signal arrives; return the exit code.

    Raises:
        StartError: a worker did not start.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    reloads: set[asyncio.Task[None]] = set()

    def on_signal(number: int) -> None:
        if stop.is_set():
            workers.send(signal.SIGKILL)
        logger.info(event("stopping", signal=signal.Signals(number).name))
        stop.set()

    async def reload() -> None:
        # systemd waits for the start, and then for the stop.
        is_serving = starting.done() and not stop.is_set()
        if is_serving:
            systemd.reloading()
        await workers.execute(RELOAD, "")
        if is_serving and not stop.is_set():
            systemd.ready("serving")

    def on_reload() -> None:
        task = loop.create_task(reload())
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    starting = asyncio.create_task(workers.start())
    signals.on_sighup(loop, on_reload)
    stopping = asyncio.create_task(stop.wait())
    draining = asyncio.create_task(workers.drained.wait())
    beside: list[asyncio.Task[Any]] = [draining]
    await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
    if not stop.is_set():
        line = (await starting).rstrip("\n")
        sys.stdout.write(f"{line}, {config.workers} workers\n")
        sys.stdout.flush()
        systemd.ready("serving")
        beside += [asyncio.create_task(systemd.keep_alive()), asyncio.create_task(rescan.run(on_reload))]
        await asyncio.wait([stopping, draining], return_when=asyncio.FIRST_COMPLETED)
    if not stop.is_set():
        logger.info(event("stopping", reason="an operator's call"))
        # A signal from now on is the second.
        stop.set()
    systemd.stopping()
    starting.cancel()
    has_stopped = await workers.stop()
    for task in (*beside, *reloads):
        task.cancel()
    return 0 if has_stopped else 1


def run(sources: Sequence[str], config: ServeConfig) -> int:
    """Serve with several processes; return the exit code.

    Raises:
        VqserveError: the address cannot be bound, or a worker does not start.
    """
    event_log.set_up(config.log_level, form=config.log_format, is_parent=True)
    grpcio_release.warn_if_untested()
    # Check here, so that an error is reported once and not by every worker.
    find_codebooks(sources).check()
    host, port = config.rpc.host, config.rpc.port
    check_protected(host, config.access)
    reserve(host, port, shared=False).close()
    access = Access(config.access)
    if config.access.health_port:
        reserve(host, config.access.health_port, shared=False, flag="--health-port").close()
    memories, processes = [SharedMemory(METRICS, NBYTES, config.workers)], Processes()
    if config.metrics.samples_traffic:
        memories.append(SharedMemory(USAGE, USAGE_BYTES, config.workers))
    parts = [[memory.part(number) for number in range(config.workers)] for memory in memories]
    shown = metrics_port(config, access, processes, parts[0], parts[1] if len(parts) > 1 else [])
    with reserve(host, port, shared=True) as held, shown as metrics:
        port = held.getsockname()[1]
        workers = Workers(sources, config, port, memories=memories, processes=processes, on_end=metrics.worker_ended)
        rescan = Rescan(sources, config.rescan_seconds)
        return asyncio.run(serve(workers, config, rescan))
