"""`vqserved serve` of a process of its own, and what the kernel says about it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

START_S = 120.0
_PAUSE_S = 0.02


class Server:
    """One server. Its log goes to a file, so that nobody has to read it.

    Attributes:
        target: its HOST:PORT.
        process: the process; with several workers, their parent.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        environment: dict[str, str] | None = None,
        stderr: IO[Any] | int | None = None,
        **options: Any,
    ) -> None:
        """Start it and wait until it is ready.

        Args:
            command: its command line.
            log: file for its stderr.
            environment: variables beside those of this process.
            stderr: where its stderr goes instead.
            options: of subprocess.Popen.
        """
        plain = {name: value for name, value in os.environ.items() if not name.startswith("VQSERVE_")}
        self._log = log
        with log.open("a") as file:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=file if stderr is None else stderr,
                text=True,
                env={**plain, **(environment or {})},
                **options,
            )
        assert self.process.stdout is not None
        guard = threading.Timer(START_S, self.process.kill)
        guard.start()
        line = self.process.stdout.readline()
        guard.cancel()
        if not line:
            self.process.wait()
            raise RuntimeError(f"the server did not start: {self.log[-2000:]}")
        self.target = line.removeprefix("vqserved: ready on ").partition(",")[0]

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        """What it has logged."""
        return self._log.read_text(errors="replace")

    @property
    def served(self) -> int:
        """Requests that it has answered; known once it has stopped."""
        return sum(int(count) for count in re.findall(r" served requests=(\d+)", self.log))

    @property
    def children(self) -> list[int]:
        """Its child processes: the workers, if it has any."""
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def resident_mib(self) -> float:
        return _status_kib(self.pid, "VmRSS") / 1024

    def peak_mib(self) -> float:
        """The most memory that was resident since the start or `reset_peak`."""
        return _status_kib(self.pid, "VmHWM") / 1024

    def reset_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def cpu_s(self) -> float:
        """Seconds of CPU that all its threads have taken."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM, *, seconds: float = 60.0) -> float:
        """Send a signal and wait for the end; return the seconds that took, infinity where it had to be killed."""
        began = time.monotonic()
        self.send(number)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return float("inf")
        return time.monotonic() - began

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def _status_kib(pid: int, key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    if found is None:
        raise RuntimeError(f"process {pid} has no {key}: it has ended")
    return int(found[1])


def within(seconds: float) -> Iterator[float]:
    """Yield the seconds that have passed, again and again, until `seconds` have."""
    began = time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        yield passed
        time.sleep(_PAUSE_S)
