"""Progress of a task on stderr: a bar on a terminal, otherwise (in a log) a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_SECONDS_PER_LINE = 10.0


class Progress(Protocol):
    """Receives the progress of one task."""

    def update(self, count: int = 1, /) -> object:
        """Add `count` finished units."""

    def set_postfix_str(self, text: str, /) -> None:
        """Set the text that is shown after the count."""


@contextmanager
def progress_of(what: str, total: int, unit: str, *, shown: bool, is_main: bool = False) -> Iterator[Progress]:
    """Show the progress of a task while the `with` lasts.

    Args:
        what: name of the task, such as "training".
        total: number of units.
        unit: name of a unit, such as "step".
        shown: whether to show progress at all.
        is_main: whether to show the end even if the task was too short for a line.
    """
    if shown and not sys.stderr.isatty():
        lines = _Lines(what, total, f"{unit}s")
        yield lines
        if is_main:
            lines.end()
    elif not shown:
        yield _Nothing()
    else:
        from tqdm import tqdm  # noqa: PLC0415

        with tqdm(total=total, desc=what, unit=unit, leave=is_main) as bar:
            yield bar


class _Nothing:
    """Progress that is not shown."""

    def update(self, count: int = 1, /) -> None:
        pass

    def set_postfix_str(self, text: str, /) -> None:
        pass


class _Lines:
    """Progress as lines, at least _SECONDS_PER_LINE apart."""

    def __init__(self, what: str, total: int, units: str) -> None:
        self._what = what
        self._total = total
        self._units = units
        self._done = 0
        self._note = ""
        self._shown_at = time.monotonic()
        self._shown = 0

    def update(self, count: int = 1, /) -> None:
        self._done += count
        if time.monotonic() - self._shown_at >= _SECONDS_PER_LINE:
            self._show()

    def set_postfix_str(self, text: str, /) -> None:
        self._note = f", {text}"

    def end(self) -> None:
        if self._shown != self._done:
            self._show()

    def _show(self) -> None:
        self._shown_at, self._shown = time.monotonic(), self._done
        sys.stderr.write(f"{self._what}: {self._done} of {self._total} {self._units}{self._note}\n")
        sys.stderr.flush()
