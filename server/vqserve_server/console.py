"""What the daemon writes: the lines of its log, and untrusted text in them."""

from __future__ import annotations

import logging
import sys


def set_up(level: str, *, worker: int | None = None) -> None:
    """Send the log to stderr, one line for each event.

    Args:
        level: "debug", "info", "warning" or "error".
        worker: number of this process among several that serve a port, or None; it is a field of every line.
    """
    field = "" if worker is None else f" worker={worker}"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(f"%(asctime)s %(levelname)s %(origin)s%(message)s{field}"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def event(name: str, /, **fields: object) -> str:
    """Return a line of the log: `name key=value key="value with spaces"`.

    Args:
        name: what happened, in snake_case.
        fields: numbers are written as they are, floats with four significant digits.
    """
    return " ".join([name, *(f"{key}={_value(value)}" for key, value in fields.items())])


def _value(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    if text and not set(text) & set(' "='):
        return printable(text)
    escaped = printable(text.replace("\\", "\\\\").replace('"', '\\"'))
    return f'"{escaped}"'


class _Formatter(logging.Formatter):
    """Adds the module's name to the lines of other packages; the events of this one need none."""

    def format(self, record: logging.LogRecord) -> str:
        record.origin = "" if record.name.partition(".")[0] == "vqserve_server" else f"{record.name}: "
        return super().format(record)


def printable(text: str) -> str:
    """Return text without characters that control a terminal; they are escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
