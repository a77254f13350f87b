"""What the log's lines look like."""

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
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format=f"%(asctime)s %(levelname)s {who}%(name)s: %(message)s",
        force=True,
    )
