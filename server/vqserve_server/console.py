"""The format of the daemon's log, also for untrusted text in it."""

from __future__ import annotations

import logging
import sys

from vqserve.text import printable


def set_up(level: str, *, worker: int | None = None) -> None:
    """Send the log to stderr, one line for each event.

    Args:
        level: "debug", "info", "warning" or "error".
        worker: number of this process among several that serve a port, added to every line; None if it is the only one.
    """
    field = "" if worker is None else f" worker={worker}"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(f"%(asctime)s %(levelname)s %(origin)s%(message)s{field}"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def event(name: str, /, **fields: object) -> str:
    """Return the text of an event for the log: `name key=value key="value with spaces"`.

    Args:
        name: name of the event, in snake_case.
        fields: fields of the event; floats are written with four significant digits.
    """
    return " ".join([name, *(f"{key}={_value(value)}" for key, value in fields.items())])


def _value(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    if text and not set(text) & set(' "='):
        return printable(text)
    escaped = printable(text.replace("\\", "\\\\").replace('"', '\\"'))
    return f'"{escaped}"'


class _Formatter(logging.Formatter):
    """Adds the name of the module to lines of other packages, but not to the server's own events."""

    def format(self, record: logging.LogRecord) -> str:
        record.origin = "" if record.name.partition(".")[0] == "vqserve_server" else f"{record.name}: "
        return super().format(record)
