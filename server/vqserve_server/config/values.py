"""The values of settings: each function reads one from a text, or raises a ValueError that says what it must be."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

_SWITCH = {"on": True, "1": True, "true": True, "yes": True, "off": False, "0": False, "false": False, "no": False}
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")


def text(value: str) -> str:
    """Return a text that is not empty."""
    if not value:
        raise ValueError("must not be empty")
    return value


def path(value: str) -> str:
    """Return the path of a file; "": none. In a file of settings it is relative to the folder of that file."""
    return value


def device(value: str) -> str:
    """Return the name of a device."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError(f"must be auto, cpu, cuda or cuda:N, not {value!r}")
    return value


def devices(value: str) -> str:
    """Return names of devices, separated by commas; "": none."""
    for name in value.split(",") if value else ():
        device(name)
    return value


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """Return a function that reads one of some names."""

    def parse(value: str) -> str:
        if value not in names:
            raise ValueError(f"must be one of {', '.join(names)}, not {value!r}")
        return value

    return parse


def seconds(value: str) -> float:
    """Return a number of seconds, at most a day."""
    number = _number(value)
    if not 0 <= number <= 86_400:
        raise ValueError(f"must be a number of seconds from 0 to 86400, not {value!r}")
    return number


def zero_or_seconds(low: int) -> Callable[[str], float]:
    """Return a function that reads a number of seconds that is 0 or at least `low`."""

    def parse(value: str) -> float:
        number = seconds(value)
        if 0 < number < low:
            raise ValueError(f"must be 0 or from {low} to 86400 seconds, not {value!r}")
        return number

    return parse


def switch(value: str) -> bool:
    """Return whether a switch is on."""
    if value.lower() not in _SWITCH:
        raise ValueError(f"must be on or off, not {value!r}")
    return _SWITCH[value.lower()]


def integer(low: int, high: int) -> Callable[[str], int]:
    """Return a function that reads an integer between two limits."""

    def parse(value: str) -> int:
        number = int(value) if re.fullmatch(r"\d{1,18}", value, re.ASCII) else -1
        if not low <= number <= high:
            raise ValueError(f"must be an integer from {low} to {high}, not {value!r}")
        return number

    return parse


def url(value: str) -> str:
    """Return the URL of an HTTP server; "": none."""
    if value and not re.fullmatch(r"https?://[^/\s]+\S*", value):
        raise ValueError(f"must be a URL that begins with http:// or https://, not {value!r}")
    return value


def share(value: str) -> float:
    """Return a number from 0 to 1."""
    number = _number(value)
    if not 0 <= number <= 1:
        raise ValueError(f"must be a number from 0 to 1, not {value!r}")
    return number


def port_or_auto(value: str) -> str:
    """Return the text of a port, or "auto"."""
    if value != "auto":
        integer(0, 65535)(value)
    return value


def written(value: object) -> str:
    """Return the text from which a value is read again."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return repr(value) if isinstance(value, float) else str(value)


def _number(value: str) -> float:
    """Return a number; NaN, which is in no range, if the text is none."""
    try:
        return float(value)
    except ValueError:
        return math.nan
