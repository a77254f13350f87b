"""Where a process's time goes, by the parts of it: perf's samples, counted by shared object."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Callable

# The first whose text is in the name of the shared object.
_PARTS = (
    ("kernel", "kernel"),
    ("libsearch", "search"),
    ("cygrpc", "gRPC"),
    ("numpy", "numpy"),
    ("openblas", "numpy"),
    ("torch", "torch"),
    ("python", "interpreter"),
    ("libc.so", "libc"),
    ("libc-", "libc"),
)


def split(pid: int, seconds: float, load: Callable[[], object]) -> str:
    """Return the shares of a process's time under a load, greatest first; empty where perf can't be used."""
    if shutil.which("perf") is None:
        return ""
    thread = threading.Thread(target=load)
    thread.start()
    with tempfile.NamedTemporaryFile(suffix=".perf") as samples:
        record = [
            "perf",
            "record",
            "-q",
            "-F",
            "997",
            "-p",
            str(pid),
            "-o",
            samples.name,
            "--",
            "sleep",
            f"{seconds:g}",
        ]
        recorded = subprocess.run(record, capture_output=True, text=True, check=False)
        thread.join()
        if recorded.returncode:
            return ""
        report = ["perf", "report", "-q", "--stdio", "--sort", "dso", "-i", samples.name]
        text = subprocess.run(report, capture_output=True, text=True, check=True).stdout
    shares: Counter[str] = Counter()
    for line in text.splitlines():
        percent, _, name = line.strip().partition("%")
        if name:
            shares[_part(name)] += float(percent)
    return ", ".join(f"{part} {share:.0f} %" for part, share in shares.most_common() if share >= 1)


def _part(name: str) -> str:
    return next((part for mark, part in _PARTS if mark in name), "other")
