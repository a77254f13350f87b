"""How many bytes each server has received, by the kernel's count: its share of a load of equal requests."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Sequence

_PAUSE_S = 0.25


def shares(targets: Sequence[str], seconds: float) -> dict[str, float]:
    """Return each server's part of what all receive in this time, where 1 is an even part.

    Connections are read several times a second, so what one received just before it was closed is missed.

    Raises:
        RuntimeError: `ss`, of iproute2, is not installed.
    """
    if shutil.which("ss") is None:
        raise RuntimeError("needs ss (iproute2)")
    totals: Counter[str] = Counter()
    before = _connections(targets)
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        time.sleep(_PAUSE_S)
        now = _connections(targets)
        for (target, peer), received in now.items():
            totals[target] += max(0, received - before.get((target, peer), 0))
        before = now
    even = totals.total() / len(targets) or float("nan")
    return {target: totals[target] / even for target in targets}


def _connections(targets: Sequence[str]) -> dict[tuple[str, str], int]:
    shown = subprocess.run(["ss", "-tinHO", "state", "established"], capture_output=True, text=True, check=True).stdout
    found = {}
    for line in shown.splitlines():
        fields = line.split()
        local, peer = (field.replace("[::ffff:", "").replace("]:", ":") for field in fields[2:4])
        received = re.search(r"bytes_received:(\d+)", line)
        if local in targets and received is not None:
            found[local, peer] = int(received[1])
    return found
