"""One of several workers is killed, stopped, or loses its device, while ordinary clients are served."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.faults import Faults
from support.waiting import eventually, read_until
from vqserve_client import Client

LATENTS = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)


@pytest.fixture
def daemon(vqserved: Callable[..., Any], tmp_path: Path, tokenizer: Any, faults: Faults) -> Any:
    """Two workers; `daemon.pids` are their processes."""
    started = vqserved(tmp_path / "book.safetensors", "--workers", 2, "--watchdog-seconds", 4, **faults.environ)
    lines = [read_until(started.process.stderr, "worker_ready") for _ in range(2)]
    fields = [dict(field.split("=") for field in line.split() if "=" in field) for line in lines]
    started.pids = {int(each["number"]): int(each["pid"]) for each in fields}
    return started


class Load:
    """Clients that encode all the time."""

    def __init__(self, target: str, expected: np.ndarray) -> None:
        self._target = target
        self._expected = expected
        self._stop = threading.Event()
        self._counts = [0] * 6
        self.failures: list[BaseException] = []
        # Those with an even number connect once, the others again and again.
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(len(self._counts))]

    @property
    def calls(self) -> int:
        """How often each client was served, of the one that was least often."""
        return min(self._counts)

    def _run(self, number: int) -> None:
        try:
            while not self._stop.is_set():
                with Client(self._target) as client:
                    while True:
                        np.testing.assert_array_equal(client.encode(LATENTS), self._expected)
                        self._counts[number] += 1
                        if number % 2 or self._stop.wait(0.01):
                            break
        except BaseException as error:
            self.failures.append(error)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        eventually(lambda: self.calls or self.failures)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@contextmanager
def load(daemon: Any, tokenizer: Any) -> Iterator[Load]:
    """Clients that see nothing of what happens in the block, and are served by both workers after it."""
    with Load(daemon.target, tokenizer.encode(LATENTS)) as clients:
        yield clients
        read_until(daemon.process.stderr, "worker_ready number=0")
        before = clients.calls
        eventually(lambda: clients.calls > before + 20 or clients.failures)
    assert not clients.failures


def test_a_worker_that_is_killed(daemon: Any, tokenizer: Any) -> None:
    with load(daemon, tokenizer):
        os.kill(daemon.pids[0], signal.SIGKILL)
        assert "code=-9 restart_s=0.5 ready=1" in read_until(daemon.process.stderr, "worker_ended")
    assert daemon.stop(signal.SIGTERM)[0] == 0


def test_a_worker_that_is_stopped(daemon: Any, tokenizer: Any) -> None:
    with load(daemon, tokenizer):
        os.kill(daemon.pids[0], signal.SIGSTOP)
        assert f"number=0 pid={daemon.pids[0]} seconds=4" in read_until(daemon.process.stderr, "ERROR worker_hung")
        assert "number=0 code=-9" in read_until(daemon.process.stderr, "worker_ended")
    assert daemon.stop(signal.SIGTERM)[0] == 0


@pytest.mark.parametrize(("fault", "event"), [("sticky", "device_failed"), ("hang", "device_hung")])
def test_a_worker_whose_device_has_a_fault(daemon: Any, tokenizer: Any, faults: Faults, fault: Any, event: str) -> None:
    with load(daemon, tokenizer):
        faults.put(fault)
        read_until(daemon.process.stderr, f"CRITICAL {event}")
        assert "number=0 code=1" in read_until(daemon.process.stderr, "worker_ended")
    assert daemon.stop(signal.SIGTERM)[0] == 0


def test_a_worker_whose_device_computes_garbage(daemon: Any, tokenizer: Any, faults: Faults) -> None:
    """No client asks until the canary has noticed: what it got would be wrong."""
    faults.put("garbage")
    read_until(daemon.process.stderr, "CRITICAL device_wrong")
    assert "number=0 code=1" in read_until(daemon.process.stderr, "worker_ended")
    with load(daemon, tokenizer):
        pass
    assert daemon.stop(signal.SIGTERM)[0] == 0


def test_a_worker_whose_interpreter_is_stuck(daemon: Any, tokenizer: Any, faults: Faults) -> None:
    with load(daemon, tokenizer):
        faults.put("hold_the_interpreter")
        read_until(daemon.process.stderr, "ERROR worker_hung number=0")
    assert daemon.stop(signal.SIGTERM)[0] == 0


def test_a_server_whose_processes_were_all_stopped_goes_on(daemon: Any, tokenizer: Any) -> None:
    pids = [*daemon.pids.values(), daemon.process.pid]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    threading.Event().wait(6)
    # The parent first: it finds no sign of life.
    for pid in reversed(pids):
        os.kill(pid, signal.SIGCONT)
    with Client(daemon.target) as client:
        np.testing.assert_array_equal(client.encode(LATENTS), tokenizer.encode(LATENTS))
    code, log = daemon.stop(signal.SIGTERM)
    assert code == 0
    assert "worker_hung" not in log


def test_a_worker_that_never_recovers_is_started_less_and_less_often(
    daemon: Any, tokenizer: Any, faults: Faults
) -> None:
    for pause in ("0.5", "1", "2"):
        faults.put("sticky")
        assert f"number=0 code=1 restart_s={pause} ready=1" in read_until(daemon.process.stderr, "worker_ended")
        read_until(daemon.process.stderr, "worker_ready number=0")
    with Client(daemon.target) as client:
        np.testing.assert_array_equal(client.encode(LATENTS), tokenizer.encode(LATENTS))
    assert daemon.stop(signal.SIGTERM)[0] == 0
