"""The formats of the daemon's log, text for people and JSON for machines, also for untrusted text in it."""

from __future__ import annotations

import faulthandler
import io
import json
import logging
import math
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

from vqserve.text import printable
from vqserve_server import stderr

# For each value of metadata that is not UTF-8 grpcio logs the value, which may be an access token, and a traceback.
_METADATA_LOGGER, _METADATA_TEXT = "grpc._cython.cygrpc", "Invalid encoding on "


# With an event that is the same in every process of a server, `extra=ONCE`: only the first worker logs it.
ONCE = {"is_once": True}


def set_up(level: str, *, form: str = "text", worker: int | None = None, is_parent: bool = False) -> None:
    """Send the log to stderr, one line for each event, without ever waiting for its reader; call it once.

    A crash of the interpreter leaves a traceback there.

    Args:
        level: "debug", "info", "warning" or "error".
        form: "text" or "json".
        worker: number of this process among several that serve a port, added to every line; None if it is the only one.
        is_parent: whether this process is the parent of such processes.
    """
    write_to(stderr.take_over(_FORMATTERS[form](worker).dropped), level, form=form, worker=worker)
    if worker or is_parent:
        for handler in logging.getLogger().handlers:
            handler.addFilter(lambda record: not getattr(record, "is_once", False))
    faulthandler.enable(sys.stderr)


def level() -> str:
    """Return the level of the log: "debug", "info", "warning" or "error"."""
    return logging.getLevelName(logging.getLogger().level).lower()


def set_level(name: str) -> str:
    """Change the level of the log, and return the one before."""
    before = level()
    logging.getLogger().setLevel(name.upper())
    return before


def write_to(stream: TextIO | io.TextIOBase, level: str, *, form: str = "text", worker: int | None = None) -> None:
    """Send the log to a stream; see `set_up`."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_FORMATTERS[form](worker))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger(_METADATA_LOGGER).addFilter(_is_no_metadata)


class Event(str):
    """The text of an event: `name key=value key="value with spaces"`.

    Attributes:
        event: its name.
        fields: its fields.
    """

    event: str
    fields: Mapping[str, object]


def event(name: str, /, **fields: object) -> Event:
    """Return an event for the log.

    Args:
        name: name of the event, in snake_case.
        fields: fields of the event; floats are written with four significant digits.
    """
    text = Event(" ".join([name, *(f"{key}={_value(value)}" for key, value in fields.items())]))
    text.event, text.fields = name, fields
    return text


def _value(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    if text and not set(text) & set(' "='):
        return printable(text)
    escaped = printable(text.replace("\\", "\\\\").replace('"', '\\"'))
    return f'"{escaped}"'


def _is_no_metadata(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_METADATA_TEXT)


class _Formatter(logging.Formatter):
    def dropped(self, count: int) -> str:
        """Return the line of the event that lines were dropped."""
        text = event("log_lines_dropped", count=count)
        return self.format(logging.LogRecord(__name__, logging.WARNING, "", 0, text, None, None)) + "\n"


class _Text(_Formatter):
    """Adds the name of the module to lines of other packages, but not to the server's own events."""

    def __init__(self, worker: int | None) -> None:
        field = "" if worker is None else f" worker={worker}"
        super().__init__(f"%(asctime)s %(levelname)s %(origin)s%(message)s{field}")

    def format(self, record: logging.LogRecord) -> str:
        record.origin = "" if record.name.partition(".")[0] == "vqserve_server" else f"{record.name}: "
        return super().format(record)


class _Json(_Formatter):
    """One object a line: `time`, `level`, `logger`, `event` and its fields, or `message`; perhaps `exception`."""

    def __init__(self, worker: int | None) -> None:
        super().__init__()
        self._fixed = {} if worker is None else {"worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            **self._fixed,
        }
        if isinstance(record.msg, Event):
            # What a field is called must not hide what every line has.
            entry |= {
                "event": record.msg.event,
                **{key: _plain(value) for key, value in record.msg.fields.items() if key not in entry},
            }
        else:
            entry["message"] = record.getMessage()
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        # ASCII alone: no text of a stranger can end the line or move a terminal's cursor.
        return json.dumps(entry)


def _plain(value: object) -> object:
    # JSON has no word for NaN and infinity.
    is_plain = isinstance(value, bool | int | str | None) or (isinstance(value, float) and math.isfinite(value))
    return value if is_plain else str(value)


_FORMATTERS: dict[str, type[_Text] | type[_Json]] = {"text": _Text, "json": _Json}
