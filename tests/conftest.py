"""What tests of several packages share: real servers on free ports."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from support.processes import starts_a_process

# Examples are not timed: how long one takes says more about what else the machine does.
settings.register_profile("vqserve", deadline=None)
settings.load_profile("vqserve")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add how much the large tests do."""
    parser.addoption("--search-rows", type=int, default=100_000, help="rows of the exactness test, all shapes together")
    parser.addoption("--soak-seconds", type=float, default=4.0, help="how long codebooks are swapped under load")
    parser.addoption("--job-kills", type=int, default=12, help="how often jobs over data sets are killed")
    parser.addoption("--fuzz-pickles", type=int, default=2_000, help="torch files that are mutated and read")
    parser.addoption("--wire-cases", type=int, default=100_000, help="messages of the test of the wire's codec")


def pytest_configure() -> None:
    """Undo what shells do to background jobs: they start them with SIGINT ignored, and so their children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make test-fast` leaves out."""
    for item in items:
        if isinstance(item, pytest.Function) and starts_a_process(item):
            item.add_marker("process")


@dataclass
class RunningServer:
    """A server in this process: `app.engine` is its engine, `target` what a client connects to."""

    target: str
    app: Any
    loop: asyncio.AbstractEventLoop

    def call(self, coroutine: Any) -> Any:
        """Run a coroutine on the server's loop and return its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def stop(self) -> bool:
        """Stop it as SIGTERM would; return whether all requests were answered in time."""
        return self.call(self.app.stop())


@contextmanager
def _serving(tokenizers: Sequence[Any], environ: dict[str, str], instruments: Any) -> Iterator[RunningServer]:
    from vqserve_server.app import App  # noqa: PLC0415
    from vqserve_server.config import resolve  # noqa: PLC0415

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="test-server")
    thread.start()
    try:

        async def start() -> tuple[Any, int]:
            app = App(tokenizers, resolve({"port": 0}, environ), instruments=instruments)
            return app, await app.start()

        app, port = asyncio.run_coroutine_threadsafe(start(), loop).result()
        server = RunningServer(f"127.0.0.1:{port}", app, loop)
        try:
            yield server
        finally:
            server.stop()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def serving() -> Iterator[Callable[..., RunningServer]]:
    """Start a server in this process: serving(tokenizer, ..., max_batch_rows=64) -> RunningServer."""
    with ExitStack() as stack:

        def start(*tokenizers: Any, instruments: Any = None, **settings: object) -> RunningServer:
            environ = {f"VQSERVE_{name.upper()}": str(value) for name, value in settings.items()}
            return stack.enter_context(_serving(tokenizers, environ, instruments))

        yield start


@dataclass
class Daemon:
    """A `vqserved serve` of its own process, ready."""

    process: subprocess.Popen[str]
    ready_line: str
    target: str

    def rescan(self, workers: int = 1) -> list[str]:
        """Have it look at its files again, and return what it said until that was done, by all of its workers."""
        assert self.process.stderr is not None
        self.process.send_signal(signal.SIGHUP)
        lines: list[str] = []
        while sum(" reload_done " in line for line in lines) < workers:
            line = self.process.stderr.readline()
            if not line:
                pytest.fail(f"the daemon has ended: {''.join(lines)}")
            lines.append(line)
        return lines

    def stop(self, signal_number: int) -> tuple[int, str]:
        """Send a signal, wait for the end, and return the exit code and the log."""
        self.process.send_signal(signal_number)
        _, log = self.process.communicate()
        return self.process.returncode, log


@pytest.fixture
def put() -> Callable[..., Any]:
    """Write a codebook as `vqserved import` would, and load it here: put(path, seed=0, num_codes=40, dim=4)."""

    def write(path: Path, *, seed: int = 0, num_codes: int = 40, dim: int = 4) -> Any:
        import torch  # noqa: PLC0415

        from vqserve_server.codebooks import save_codebook  # noqa: PLC0415
        from vqserve_server.quantizers import VectorQuantizer  # noqa: PLC0415
        from vqserve_server.tokenizer import Tokenizer  # noqa: PLC0415

        quantizer = VectorQuantizer(num_codes, dim)
        codes = torch.randn(num_codes, dim, generator=torch.Generator().manual_seed(seed))
        quantizer.load_state_dict({"embedding.weight": codes})
        path.parent.mkdir(parents=True, exist_ok=True)
        save_codebook(quantizer, path)
        return Tokenizer.load(path, device="cpu")

    return write


def daemon_environment(**extra: str) -> dict[str, str]:
    """The environment of a daemon under test: this one's, without settings, on one thread."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("VQSERVE_")}
    # Many servers at once have no metrics port: there is one default.
    return {**plain, "OMP_NUM_THREADS": "1", "VQSERVE_METRICS_PORT": "0", **extra}


@pytest.fixture
def vqserved() -> Iterator[Callable[..., Daemon]]:
    """Start a daemon and wait until it is ready: vqserved("demo=path", "--device", "cpu") -> Daemon.

    The port is a free one unless the arguments name one.
    """
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: object, **environ: str) -> Daemon:
        port = () if "--port" in arguments else ("--port", "0")
        process = subprocess.Popen(
            [sys.executable, "-m", "vqserve_tools", "serve", *port, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=daemon_environment(**environ),
        )
        processes.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            pytest.fail(f"the daemon did not start: {process.communicate()[1]}")
        return Daemon(process, line, line.removeprefix("vqserved: ready on ").partition(",")[0])

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def run_vqserved() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `vqserved ARGUMENTS` to its end."""

    def run(*arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "vqserve_tools", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env=daemon_environment(**environ),
        )

    return run
