"""How far a job is: counted by its threads, shown on a terminal, as lines, or as JSON."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

# Seconds between two lines where there is no terminal, and between two lines of JSON.
_LINE_S = 10.0
_JSON_S = 1.0
_REDRAW_S = 0.25
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass
class Counts:
    """Counts of one run. Each is written by one thread.

    Attributes:
        total_bytes: bytes of all sources; of a part of them, what the sizes say.
        total_items: items in all sources; None: not known before they are read.
        begun_items: items of parts that an earlier run wrote.
        read_bytes: bytes of the sources that were read, those of earlier runs included.
        read_items: items that were read by this run.
        items: items with a result.
        bad: items without one.
        tokens: tokens that were converted.
        written_bytes: bytes of results.
        parts: parts that were written.
        waited_for_sources_s: seconds for which nothing was sent because the sources were slow.
        waited_for_output_s: seconds for which nothing was sent because the output was slow.
        seconds: seconds since the run began.
    """

    total_bytes: int = 0
    total_items: int | None = None
    begun_items: int = 0
    read_bytes: int = 0
    read_items: int = 0
    items: int = 0
    bad: int = 0
    tokens: int = 0
    written_bytes: int = 0
    parts: int = 0
    waited_for_sources_s: float = 0.0
    waited_for_output_s: float = 0.0
    seconds: float = 0.0

    @property
    def done(self) -> int:
        """Items that need no more work, those of earlier runs included."""
        return self.begun_items + self.items + self.bad

    @property
    def share(self) -> float | None:
        """How much of the whole job is done, from 0 to 1; None: not known."""
        if self.total_items:
            return min(1.0, self.done / self.total_items)
        return min(1.0, self.read_bytes / self.total_bytes) if self.total_bytes else None

    @property
    def left_s(self) -> float | None:
        """Seconds that are left at the speed so far; None: not known."""
        share, before = self.share, self.begun_items / self.total_items if self.total_items else 0.0
        if share is None or share <= before:
            return None
        return self.seconds * (1 - share) / (share - before)

    def text(self) -> str:
        """Return the counts as one line."""
        whole = f" of {self.total_items:,}" if self.total_items else ""
        share = "" if self.share is None else f", {self.share:.0%}"
        seconds = max(self.seconds, 1e-9)
        rates = f"{short(self.tokens / seconds)} tokens/s, {short(self.written_bytes / seconds)}B/s written"
        bad = f", {self.bad:,} without a result" if self.bad else ""
        left = "" if self.left_s is None else f", {timedelta(seconds=round(self.left_s))} left"
        return f"{self.done:,}{whole} items{share}, {rates}{bad}{left}"

    def json(self) -> str:
        """Return the counts as a line of JSON."""
        fields: dict[str, Any] = {"event": "progress", **asdict(self), "share": self.share, "left_s": self.left_s}
        return json.dumps(
            {key: round(value, 3) if isinstance(value, float) else value for key, value in fields.items()}
        )


def short(number: float) -> str:
    """Return a number with three digits and a unit: "1.25 M"."""
    for size, unit in _UNITS:
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g} "


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 item", "1,200 items"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


class Display:
    """Shows the counts while its block runs, by a thread of its own.

    `form` is "bar" for one line of a terminal that is drawn again, "lines" for a line now and then, "json" for lines of
    JSON on stdout, or "none".
    """

    def __init__(self, counts: Counts, form: str) -> None:
        self._counts = counts
        self._form = form
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vqserve-progress", daemon=True)

    def __enter__(self) -> Self:
        if self._form != "none":
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._form != "none":
            self._thread.join()
        self._counts.seconds = time.monotonic() - self._began

    def _run(self) -> None:
        # Whoever reads it may have gone: the job goes on.
        with contextlib.suppress(OSError, ValueError):
            self._show()

    def _show(self) -> None:
        if self._form == "bar":
            self._draw()
            return
        pause_s = _JSON_S if self._form == "json" else _LINE_S
        while not self._ended.wait(pause_s):
            self._counts.seconds = time.monotonic() - self._began
            if self._form == "json":
                print(self._counts.json(), flush=True)
            else:
                print(f"vqserve: {self._counts.text()}", file=sys.stderr, flush=True)

    def _draw(self) -> None:
        from tqdm import tqdm  # noqa: PLC0415

        with tqdm(bar_format="{desc}", file=sys.stderr, leave=False) as line:
            while not self._ended.wait(_REDRAW_S):
                self._counts.seconds = time.monotonic() - self._began
                line.set_description_str(self._counts.text())
