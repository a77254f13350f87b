"""Waiting, with an end: for what becomes true of itself, and for a line of a process's log."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TextIO

import pytest

# Far more than anything takes on a machine that has other work: only a test that fails waits so long.
DEADLINE_S = 60.0
_PAUSE_S = 0.005


def eventually(condition: Callable[[], Any], *, seconds: float = DEADLINE_S) -> Any:
    """Return what `condition` returns once that is true; the test fails if it is not within `seconds`."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > until:
            pytest.fail(f"still not true after {seconds:g} s, the last value is {value!r}")
        time.sleep(_PAUSE_S)
    return value


def read_until(log: TextIO, text: str) -> str:
    """Read a process's output up to the line that has the text, and return that line.

    The test fails where the output ends without it. A process that neither writes nor ends is left to pytest's timeout.
    """
    lines: list[str] = []
    for line in iter(log.readline, ""):
        lines.append(line)
        if text in line:
            return line
    pytest.fail(f"the process has ended, and wrote no line with {text!r} but: {''.join(lines)}")
