"""What a real server tells systemd, and how it ends: a socket of this test stands for systemd's."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vqserve_client import Client
from vqserve_server import systemd

LATENTS = np.zeros((8, 4), np.float32)


class Manager:
    """Receives what a service says, at a path or at an abstract address."""

    def __init__(self, address: str) -> None:
        self.environ = {"NOTIFY_SOCKET": address.replace("\0", "@")}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self.messages: list[dict[str, str]] = []

    def next(self, *without: str) -> dict[str, str]:
        """Wait for the next message that has none of these entries."""
        while True:
            lines = self._socket.recv(4096).decode().split("\n")
            message = dict(line.split("=", 1) for line in lines)
            self.messages.append(message)
            if not message.keys() & set(without):
                return message

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    path = str(tmp_path / "notify")
    made = Manager(path if request.param == "path" else f"\0vqserve-{os.getpid()}-{time.time_ns()}")
    yield made
    made.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_start_reload_and_stop(
    vqserved: Callable[..., Any], put: Callable[..., Any], tmp_path: Path, manager: Manager, workers: int
) -> None:
    put(tmp_path / "books" / "book.safetensors")
    daemon = vqserved(tmp_path / "books", "--device", "cpu", "--workers", workers, **manager.environ)
    assert manager.next() == {"READY": "1", "STATUS": "serving"}

    new = put(tmp_path / "books" / "book.safetensors", seed=1)
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    daemon.process.send_signal(signal.SIGHUP)
    reloading = manager.next()
    assert (reloading["RELOADING"], reloading["STATUS"]) == ("1", "reloading")
    assert before <= int(reloading["MONOTONIC_USEC"]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert manager.next() == {"READY": "1", "STATUS": "serving"}
    # All workers have reloaded by then.
    for _ in range(4 * workers):
        with Client(daemon.target) as client:
            assert client.codebooks()[0].digest == new.digest

    daemon.process.send_signal(signal.SIGTERM)
    assert manager.next()["STOPPING"] == "1"
    assert daemon.process.wait() == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_signs_of_life(
    vqserved: Callable[..., Any], put: Callable[..., Any], tmp_path: Path, manager: Manager, workers: int
) -> None:
    put(tmp_path / "book.safetensors")
    watchdog = {"WATCHDOG_USEC": "200000"}
    daemon = vqserved(tmp_path / "book.safetensors", "--workers", workers, **manager.environ, **watchdog)
    for _ in range(5):
        manager.next("READY")
    assert [message for message in manager.messages if message == {"WATCHDOG": "1"}]
    # The parent alone: two would not notice that one is stuck.
    assert sum("READY" in message for message in manager.messages) == 1
    assert daemon.stop(signal.SIGTERM)[0] == 0


def test_a_watchdog_of_another_process_is_not_served(
    vqserved: Callable[..., Any], put: Callable[..., Any], tmp_path: Path, manager: Manager
) -> None:
    put(tmp_path / "book.safetensors")
    watchdog = {"WATCHDOG_USEC": "10000", "WATCHDOG_PID": "1"}
    daemon = vqserved(tmp_path / "book.safetensors", **manager.environ, **watchdog)
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait() == 0
    assert manager.next() == {"READY": "1", "STATUS": "serving"}
    assert manager.next()["STOPPING"] == "1"


@pytest.mark.parametrize("address", ["", "/nowhere/notify", "@nobody-listens", "vsock:2:1", "/" + "x" * 200])
def test_a_manager_that_is_not_there_does_no_harm(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    systemd.ready("serving")
    systemd.stopping()


def test_a_process_without_descriptors_stops_all_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))

    def none_left(*_: object) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(systemd.socket, "socket", none_left)
    systemd.stopping()


def test_a_manager_that_does_not_read_holds_up_no_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Manager(f"\0vqserve-full-{os.getpid()}")
    monkeypatch.setenv("NOTIFY_SOCKET", full.environ["NOTIFY_SOCKET"])
    monkeypatch.setenv("WATCHDOG_USEC", "20")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)

    async def live() -> None:
        # More than any socket holds.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(systemd.keep_alive(), 0.5)

    asyncio.run(live())
    systemd.ready("serving")
    full.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_accepted_requests_are_answered_after_a_signal(
    vqserved: Callable[..., Any], put: Callable[..., Any], tmp_path: Path, workers: int
) -> None:
    """NOT_SERVING, GOAWAY, the end of what was accepted, and exit code 0: whatever callers do meanwhile."""
    book = put(tmp_path / "book.safetensors")
    daemon = vqserved(tmp_path, "--device", "cpu", "--workers", workers, "--drain-seconds", 20)
    expected = book.encode(LATENTS)

    answered = 0
    with Client(daemon.target, retries=0) as client:
        try:
            for indices in client.encode_many(itertools.repeat(LATENTS)):
                np.testing.assert_array_equal(indices, expected)
                answered += 1
                if answered == 10:
                    # More requests are on their way.
                    daemon.process.send_signal(signal.SIGTERM)
        except ConnectionError:
            # The server has gone, and says so.
            pass
    assert answered >= 10
    assert daemon.process.wait() == 0
    _, log = daemon.process.communicate()
    assert "drain_expired" not in log
    assert log.count(" served requests=") == workers
