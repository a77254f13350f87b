"""What the daemon writes: the lines of its log, and text of strangers in it."""

from __future__ import annotations

import logging
import sys


def set_up(level: str, *, worker: int | None = None) -> None:
    """Send the log to stderr, one line an event.

    Args:
        level: "debug", "info", "warning" or "error".
        worker: number of this process among several that serve a port, or None.
    """
    who = "" if worker is None else f"worker {worker} "
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(f"%(asctime)s %(levelname)s {who}%(origin)s%(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class _Formatter(logging.Formatter):
    """Names the module of other packages' lines only: ours say what they are about."""

    def format(self, record: logging.LogRecord) -> str:
        record.origin = "" if record.name.partition(".")[0] == "vqserve_server" else f"{record.name}: "
        return super().format(record)


def printable(text: str) -> str:
    """Return text in which nothing that a file says of itself can move a terminal's cursor."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
