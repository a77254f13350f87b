"""A signal in the first moments of a container's first process."""

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
from reliability.setup import Setup

_DELAYS_S = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)


@scenario("sigterm-early", "SIGTERM ends a server that has just started as PID 1", seconds=10)
def sigterm_early(setup: Setup) -> Iterator[Figure]:
    if shutil.which("unshare") is None:
        yield Figure(what="needs unshare (util-linux)", value="not there", wanted="there")
        return
    for delay_s in _DELAYS_S:
        ended_s = _ended_after(setup, delay_s)
        shown: float | str = ended_s if ended_s is not None else "was lost"
        yield Figure(
            what=f"SIGTERM {delay_s:g} s after Python's start: ended after, s", value=shown, at_most=setup.seconds
        )


def _ended_after(setup: Setup, delay_s: float) -> float | None:
    command = setup.command("serve", setup.books, "--port", 0)
    with subprocess.Popen(
        ["unshare", "--pid", "--fork", "--kill-child", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as outer:
        try:
            pid = _pid_of_python(outer.pid)
            time.sleep(delay_s)
            began = time.monotonic()
            os.kill(pid, signal.SIGTERM)
            outer.wait(setup.seconds)
            return time.monotonic() - began
        except subprocess.TimeoutExpired:
            return None
        finally:
            outer.kill()


def _pid_of_python(parent: int) -> int:
    """Return the child of unshare once it runs Python."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    while True:
        for pid in children.read_text().split():
            if "vqserve_tools" in Path(f"/proc/{pid}/cmdline").read_text():
                return int(pid)
        time.sleep(0.001)
