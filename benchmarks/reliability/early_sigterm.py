"""A signal in the first moments of a container's first process.

The kernel discards a SIGTERM to process 1 until that has a handler, so what counts is how soon it has one, and that no
SIGTERM is lost from then on.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from reliability.figure import Figure
from reliability.registry import scenario
from reliability.server import START_S
from reliability.setup import Setup

_DELAYS_S = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0)
_MOST_UNHANDLED_S = 0.1
_PAUSE_S = 0.001


@scenario("sigterm-early", "SIGTERM ends a server that has just started as process 1", seconds=10)
def sigterm_early(setup: Setup) -> Iterator[Figure]:
    if shutil.which("unshare") is None:
        yield Figure(what="needs unshare (util-linux)", value="not there", wanted="there")
        return
    unhandled = []
    for delay_s in _DELAYS_S:
        unhandled_s, ended_s = _try(setup, delay_s)
        unhandled.append(unhandled_s)
        yield Figure(what=f"SIGTERM {delay_s:g} s after that: ended after, s", value=ended_s, at_most=setup.seconds)
    # The shortest: what other processes of the machine take is not the server's.
    yield Figure(what="from exec until SIGTERM counts, s", value=min(unhandled), at_most=_MOST_UNHANDLED_S)


def _try(setup: Setup, delay_s: float) -> tuple[float, float]:
    """Return the seconds until there is a handler, and those from a SIGTERM to the end; infinity where it was lost."""
    command = setup.command("serve", setup.books, "--port", 0)
    with subprocess.Popen(
        ["unshare", "--pid", "--fork", "--kill-child", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as outer:
        try:
            pid = _first_process(outer.pid)
            began = time.monotonic()
            while not _handles_sigterm(pid):
                if time.monotonic() > began + START_S:
                    return float("inf"), float("inf")
                time.sleep(_PAUSE_S)
            unhandled_s = time.monotonic() - began
            time.sleep(delay_s)
            began = time.monotonic()
            os.kill(pid, signal.SIGTERM)
            outer.wait(setup.seconds)
            return unhandled_s, time.monotonic() - began
        except subprocess.TimeoutExpired:
            return unhandled_s, float("inf")
        finally:
            outer.kill()


def _first_process(parent: int) -> int:
    """Return the child of unshare once it runs Python."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    while True:
        for pid in children.read_text().split():
            if "vqserve_tools" in Path(f"/proc/{pid}/cmdline").read_text():
                return int(pid)
        time.sleep(_PAUSE_S)


def _handles_sigterm(pid: int) -> bool:
    [line] = [one for one in Path(f"/proc/{pid}/status").read_text().splitlines() if one.startswith("SigCgt:")]
    return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
