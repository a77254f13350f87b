"""How far a task is, on stderr: a bar on a terminal, and else, for a log, a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm import tqdm

_SECONDS_PER_LINE = 10.0


class Progress(Protocol):
    """What is told of one task."""

    def update(self, count: int = 1, /) -> object:
        """Say that so many more are done."""

    def set_postfix_str(self, text: str, /) -> None:
        """Say how it goes; shown behind the count."""


@contextmanager
def progress_of(what: str, total: int, unit: str, *, shown: bool, is_main: bool = False) -> Iterator[Progress]:
    """Give what is to be told of a task.

    Args:
        what: the task, such as "training".
        total: how many units it has.
        unit: what is counted, such as "step".
        shown: whether anything is told.
        is_main: whether the end is worth a line even if all of it took no time.
    """
    if shown and not sys.stderr.isatty():
        lines = _Lines(what, total, f"{unit}s")
        yield lines
        if is_main:
            lines.end()
    else:
        with tqdm(total=total, desc=what, unit=unit, disable=not shown, leave=is_main) as bar:
            yield bar


class _Lines:
    """Progress as lines, so many seconds apart."""

    def __init__(self, what: str, total: int, units: str) -> None:
        self._what = what
        self._total = total
        self._units = units
        self._done = 0
        self._note = ""
        self._told_at = time.monotonic()
        self._told = 0

    def update(self, count: int = 1, /) -> None:
        self._done += count
        if time.monotonic() - self._told_at >= _SECONDS_PER_LINE:
            self._tell()

    def set_postfix_str(self, text: str, /) -> None:
        self._note = f", {text}"

    def end(self) -> None:
        if self._told != self._done:
            self._tell()

    def _tell(self) -> None:
        self._told_at, self._told = time.monotonic(), self._done
        sys.stderr.write(f"{self._what}: {self._done} of {self._total} {self._units}{self._note}\n")
        sys.stderr.flush()
