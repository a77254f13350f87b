"""What a server tells about itself at the moment it is asked: its processes, limits, versions and certificates."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vqserve_server.access import Access
from vqserve_server.config import ServeConfig
from vqserve_server.metrics.collector import Sample

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Processes:
    """The processes that serve.

    Attributes:
        pids: of those that run, by their numbers.
        ready: numbers of those that serve.
        restarts: how many ended and were started again.
    """

    pids: dict[int, int] = field(default_factory=dict)
    ready: set[int] = field(default_factory=set)
    restarts: int = 0


class Present:
    """The samples that no process has to count."""

    def __init__(self, config: ServeConfig, access: Access, processes: Processes) -> None:
        """Take what the samples are about.

        Args:
            config: the settings of the server.
            access: its certificates.
            processes: whoever starts them keeps it up to date.
        """
        self._config = config
        self._access = access
        self._processes = processes
        self._started = time.time()
        self._build = {
            "version": _version("vqserve"),
            "python": platform.python_version(),
            "torch": _version("torch"),
            "grpcio": _version("grpcio"),
        }

    def __call__(self) -> Iterator[Sample]:
        """Yield the samples."""
        config, processes = self._config, self._processes
        yield "build_info", self._build, 1
        yield "start_time_seconds", {}, self._started
        yield "workers", {}, config.workers
        yield "workers_ready", {}, len(processes.ready)
        yield "worker_restarts", {}, processes.restarts
        for number in range(config.workers):
            worker = {"worker": str(number)}
            yield "queue_requests_limit", worker, config.engine.max_queue_requests
            yield "queue_rows_limit", worker, config.engine.max_queue_rows
            yield "queue_bytes_limit", worker, config.engine.max_queue_bytes
        for number, pid in list(processes.pids.items()):
            resident = _resident_bytes(pid)
            if resident is not None:
                yield "process_resident_bytes", {"worker": str(number)}, resident
        certificates = self._access.certificates
        if certificates is not None:
            expires = certificates.refresh().expires
            yield "certificate_expiry_timestamp_seconds", {"file": "tls_cert"}, expires.timestamp()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _resident_bytes(pid: int) -> int | None:
    """Return the memory of a process; None if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):
        return None
