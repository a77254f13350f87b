"""Tells systemd how the server is doing (`Type=notify`): sd_notify(3), without its library.

Without the variable NOTIFY_SOCKET, so not under systemd, nothing here does anything.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time

# Environment variables of systemd.
_SOCKET, _WATCHDOG_US, _WATCHDOG_PID = "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"
# Workers must not have them: the parent speaks for all.
VARIABLES = frozenset({_SOCKET, _WATCHDOG_US, _WATCHDOG_PID})
# What must arrive waits so many seconds for a manager that does not read.
_PATIENCE_S = 1.0


def ready(status: str) -> None:
    """Say that the server serves, at the start and after a reload."""
    _notify("READY=1", f"STATUS={status}")


def reloading() -> None:
    """Say that a reload has begun; `ready` ends it."""
    # The clock of systemd, with which it tells this reload from an earlier one.
    _notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}", "STATUS=reloading")


def stopping() -> None:
    """Say that the server stops."""
    _notify("STOPPING=1", "STATUS=answering the last requests")


async def keep_alive() -> None:
    """Say that the server lives, twice as often as systemd asks for (`WatchdogSec=`), until the task is cancelled."""
    seconds = _watchdog_seconds()
    while seconds:
        _notify("WATCHDOG=1", patience_s=0.0)
        await asyncio.sleep(seconds / 2)


def _watchdog_seconds() -> float:
    if os.environ.get(_WATCHDOG_PID, str(os.getpid())) != str(os.getpid()):
        # Meant for another process, which has started this one.
        return 0.0
    text = os.environ.get(_WATCHDOG_US, "")
    return int(text) / 1e6 if text.isdecimal() else 0.0


def _notify(*lines: str, patience_s: float = _PATIENCE_S) -> None:
    address = os.environ.get(_SOCKET, "")
    # Other kinds of sockets are for virtual machines.
    if not address.startswith(("/", "@")):
        return
    # A leading @ stands for the zero byte of an abstract name.
    name = f"\0{address[1:]}" if address.startswith("@") else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(patience_s)
            sender.connect(name)
            sender.send("\n".join(lines).encode())
    except OSError:
        # The server is as good without a manager that listens, and must stop also when it has no descriptor left.
        return
