"""The worker processes of one parent: it starts them, asks them, watches them and starts them again.

The kernel distributes connections over the workers (SO_REUSEPORT). Each worker loads its own codebooks and has its own
queue, device thread and health. A client uses one worker as long as its connection lasts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vqserve.errors import StartError
from vqserve_server import config as settings
from vqserve_server import event_log, systemd
from vqserve_server.config import ServeConfig
from vqserve_server.control import (
    CONTROL_VARIABLE,
    DRAIN,
    LOG_LEVEL,
    RELOAD,
    Control,
    ControlError,
    ControlPair,
)
from vqserve_server.event_log import event
from vqserve_server.heartbeat import HEARTBEAT_VARIABLE, Checks, Pulse
from vqserve_server.metrics.memory import SharedMemory
from vqserve_server.metrics.present import Processes
from vqserve_server.process import WORKER_VARIABLE

# Seconds after --drain-seconds until a worker that has not ended is killed.
_END_S = 5.0
# Seconds in which a worker that runs answers anything but a reload, which takes as long as its codebooks take to load.
_ANSWER_S = 10.0
# How long codebooks may load until the log says so. A device that hangs may also hang the process that comes next.
_LONG_START_S = 60.0

logger = logging.getLogger(__name__)


@dataclass
class BackOff:
    """Delay before a worker is restarted: it doubles each time, until the worker has served for `steady_s`."""

    first_s: float = 0.5
    most_s: float = 60.0
    steady_s: float = 60.0
    _next_s: float = 0.0

    def delay_s(self, served_s: float) -> float:
        """Return the delay after the end of a worker that was ready for `served_s` seconds."""
        self._next_s = self.first_s if served_s >= self.steady_s or not self._next_s else self._next_s * 2
        self._next_s = min(self._next_s, self.most_s)
        return self._next_s


def worker_environment(config: ServeConfig, number: int, port: int) -> dict[str, str]:
    """Return the environment of a worker: its settings, its device, its share of the cores.

    Args:
        config: settings of the parent.
        number: number of the worker, from 0.
        port: port that the workers share.
    """
    devices = config.devices.split(",") if config.devices else [config.device]
    own = replace(
        config,
        rpc=replace(config.rpc, port=port),
        device=devices[number % len(devices)],
        workers=1,
        devices="",
        # The parent looks, so that all workers reload at once.
        rescan_seconds=0.0,
    )
    plain = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(settings.ENV_PREFIX) and name not in systemd.VARIABLES
    }
    threads = max(1, len(os.sched_getaffinity(0)) // config.workers)
    shared = {"OMP_NUM_THREADS": str(threads)} if "OMP_NUM_THREADS" not in plain else {}
    return plain | shared | settings.environment(own) | {WORKER_VARIABLE: str(number)}


class Workers:
    """The workers of one parent. Call its methods from one event loop.

    Attributes:
        drained: set when an operator's call asks the server to stop.
    """

    def __init__(
        self,
        sources: Sequence[str],
        config: ServeConfig,
        port: int,
        *,
        memories: Sequence[SharedMemory] = (),
        processes: Processes | None = None,
        on_end: Callable[[int], None] = lambda number: None,
    ) -> None:
        """Start nothing yet.

        Args:
            sources: what the command line names.
            config: the settings.
            port: port that the workers share.
            memories: memory of which each worker has a part.
            processes: is kept up to date.
            on_end: called with the number of a worker that has ended, before it is started again.
        """
        self._sources = list(sources)
        self._config = config
        self._port = port
        self._memories = memories
        self._state = processes or Processes()
        self._on_end = on_end
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._controls: dict[int, Control] = {}
        self._reloads = 0
        self._stopping = asyncio.Event()
        self._keepers: list[asyncio.Task[int]] = []
        self.drained = asyncio.Event()

    async def start(self) -> str:
        """Start all workers and wait until they are ready; return the ready line of one.

        Raises:
            StartError: a worker ended before it was ready.
        """
        lines: list[asyncio.Future[str]] = [
            asyncio.get_running_loop().create_future() for _ in range(self._config.workers)
        ]
        self._keepers = [asyncio.create_task(self._keep(number, line)) for number, line in enumerate(lines)]
        ready = [await line for line in lines]
        if not all(ready):
            await self.stop()
            raise StartError("a worker did not start; the lines above say why")
        return ready[0]

    async def stop(self, number: int = signal.SIGTERM) -> bool:
        """Stop all workers, kill those that do not stop in time, and return whether all stopped as expected."""
        self._stopping.set()
        self.send(number)
        _, late = await asyncio.wait(self._keepers, timeout=self._config.drain_seconds + _END_S)
        if late:
            logger.warning(event("workers_killed", count=len(late)))
            self.send(signal.SIGKILL)
        # A worker that is still loading is ended by the signal.
        expected = {0, 128 + number, -number}
        failed = {i: code for i, code in enumerate(await asyncio.gather(*self._keepers)) if code not in expected}
        for i, code in failed.items():
            logger.error(event("worker_failed", number=i, code=code))
        return not failed

    def send(self, number: int) -> None:
        """Send a signal to all workers."""
        for process in self._processes.values():
            _send(process, number)

    async def execute(self, command: str, argument: str) -> list[dict[str, Any]]:
        """Have all workers execute a command of `control`, and return what each did, or why it did not."""
        if command == RELOAD:
            # A worker that is starting reloads when it is ready.
            self._reloads += 1
        if command == LOG_LEVEL:
            event_log.set_level(argument)
            # Workers that are started later have it, too.
            self._config = replace(self._config, log_level=argument)
        answers = await asyncio.gather(
            *(self._execute(number, command, argument) for number in range(self._config.workers))
        )
        if command == DRAIN:
            self.drained.set()
        return answers

    async def _execute(self, number: int, command: str, argument: str) -> dict[str, Any]:
        control = self._controls.get(number) if number in self._state.ready else None
        try:
            if control is None:
                raise ControlError("the process is not ready")
            async with asyncio.timeout(None if command == RELOAD else _ANSWER_S):
                return {"worker": number, **await control.ask(command, argument)}
        except ControlError as error:
            return {"worker": number, "error": str(error)}
        except TimeoutError:
            return {"worker": number, "error": "the process does not answer"}

    async def _keep(self, number: int, first_line: asyncio.Future[str]) -> int:
        """Run one worker again and again until all stop; return its last exit code."""
        back_off = BackOff()
        while True:
            code, served_s = await self._run(number, first_line)
            if not first_line.done():
                first_line.set_result("")
                return code
            if self._stopping.is_set():
                return code
            delay_s = back_off.delay_s(served_s)
            fields = {"number": number, "code": code, "restart_s": delay_s, "ready": len(self._state.ready)}
            logger.warning(event("worker_ended", **fields))
            try:
                await asyncio.wait_for(self._stopping.wait(), delay_s)
            except TimeoutError:
                self._state.restarts += 1
                continue
            # The worker ended before the stop, so its exit code does not count.
            return 0

    async def _run(self, number: int, first_line: asyncio.Future[str]) -> tuple[int, float]:
        """Run one worker to its end; return its exit code, and for how many seconds it was ready."""
        reloads = self._reloads
        try:
            process, pulse, control = await self._spawn(number)
        except (OSError, RuntimeError) as error:
            # The system lacks memory, files, processes or threads (a RuntimeError); the next attempt may succeed.
            reason = getattr(error, "strerror", None) or error
            logger.error(event("worker_not_started", number=number, error=reason))
            return 1, 0.0
        self._processes[number] = process
        self._controls[number] = control
        listening = asyncio.create_task(control.run())
        self._state.pids[number] = process.pid
        if self._stopping.is_set():
            _send(process, signal.SIGTERM)
        line = await self._ready_line(number, process)
        ready_at = time.monotonic()
        watch = None
        if line:
            self._state.ready.add(number)
            logger.info(event("worker_ready", number=number, pid=process.pid, ready=len(self._state.ready)))
            if self._reloads != reloads:
                # The worker may have read its files before the change. Before it is ready, SIGHUP would end it.
                _send(process, signal.SIGHUP)
            if not first_line.done():
                first_line.set_result(line)
            if self._config.watchdog_seconds:
                watch = asyncio.create_task(self._watch(number, process, pulse))
        code = await process.wait()
        self._state.ready.discard(number)
        del self._processes[number], self._controls[number], self._state.pids[number]
        self._on_end(number)
        if watch is not None:
            watch.cancel()
        pulse.close()
        listening.cancel()
        return code, time.monotonic() - ready_at if line else 0.0

    async def _spawn(self, number: int) -> tuple[asyncio.subprocess.Process, Pulse, Control]:
        with contextlib.ExitStack() as started, contextlib.ExitStack() as failed:
            pulse = Pulse()
            started.callback(pulse.started)
            failed.callback(pulse.close)
            pair = ControlPair()
            started.callback(pair.started)
            failed.callback(pair.parent.close)
            environ = worker_environment(self._config, number, self._port)
            environ |= {HEARTBEAT_VARIABLE: str(pulse.sender), CONTROL_VARIABLE: str(pair.worker)}
            for memory in self._memories:
                environ |= memory.environment(number)
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "vqserve_server",
                "serve",
                *self._sources,
                env=environ,
                pass_fds=(pulse.sender, pair.worker, *(memory.descriptor for memory in self._memories)),
                # The pipe closes when the parent ends in any way; a worker then stops.
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                # A terminal's Ctrl-C goes to the parent, which stops the workers.
                start_new_session=True,
            )
            failed.pop_all()
        return process, pulse, Control(pair.parent, self.execute)

    async def _ready_line(self, number: int, process: asyncio.subprocess.Process) -> str:
        """Return what a worker writes when it is ready; "" if it ends before. The log says that it takes long."""
        if process.stdout is None:
            return ""
        reading = asyncio.ensure_future(process.stdout.readline())
        seconds = 0.0
        while not reading.done():
            await asyncio.wait([reading], timeout=_LONG_START_S)
            seconds += _LONG_START_S
            if not reading.done():
                logger.warning(event("worker_not_ready", number=number, pid=process.pid, seconds=seconds))
        return reading.result().decode()

    async def _watch(self, number: int, process: asyncio.subprocess.Process, pulse: Pulse) -> None:
        """Kill a worker that gives no sign of life: it is stopped, or its interpreter is stuck."""
        checks, silent = Checks.of(self._config.watchdog_seconds), 0
        while silent < checks.most:
            await asyncio.sleep(checks.interval_s)
            has_beaten = pulse.has_beaten()
            if has_beaten is None or self._stopping.is_set():
                return
            silent = 0 if has_beaten else silent + 1
        logger.error(event("worker_hung", number=number, pid=process.pid, seconds=self._config.watchdog_seconds))
        _send(process, signal.SIGKILL)


def _send(process: asyncio.subprocess.Process, number: int) -> None:
    # Not process.send_signal: it reaps a process that has just ended, and asyncio then reports exit code 255 for it.
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
