"""Measurements as lines of text, each complete when its load is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple

from vqserve_bench.load import Load
from vqserve_bench.measurement import Measurement

# The columns, in groups with a title.
_GROUPS = (
    ("", ("requests/s", "tokens/s", "MB/s")),
    ("latency ms", ("avg", "p50", "p90", "p95", "p99")),
    ("server ms", ("queue", "compute", "total")),
    ("batch", ("requests", "rows")),
    ("", ("errors",)),
)
_NARROWEST = 6
# Above it the event loop hardly waits: the result measures the generator.
_BUSY = 0.9


class Table:
    """The lines of a table of these loads."""

    def __init__(self, loads: Sequence[Load]) -> None:
        self._first = max(len("load"), *(len(str(load)) for load in loads))

    def heads(self) -> str:
        """Return the two lines above the rows."""
        titles = [" " * self._first]
        for title, names in _GROUPS:
            width = sum(max(_NARROWEST, len(name)) + 1 for name in names) - 1
            titles.append(f" {title} ".center(width, "-") if title else " " * width)
        return f"{'  '.join(titles).rstrip()}\n{self._line('load', [list(names) for _, names in _GROUPS])}"

    def row(self, measured: Measurement) -> str:
        """Return the line of one measurement, with its remarks at the end."""
        rates = (measured.requests_per_s, measured.tokens_per_s, measured.mb_per_s) if measured.windows else [None] * 3
        # Their fields are in the columns' order; the table leaves the largest latency out.
        latency = astuple(measured.latency_ms)[:5] if measured.latency_ms else [None] * 5
        server = astuple(measured.server) if measured.server else [None] * 5
        numbers = [[number(value) for value in group] for group in (rates, latency, server[:3], server[3:])]
        notes = ", ".join(remarks(measured))
        line = self._line(str(measured.load), [*numbers, [str(sum(measured.errors.values()))]])
        return f"{line}  {notes}" if notes else line

    def _line(self, first: str, groups: Sequence[Sequence[str]]) -> str:
        padded = [
            " ".join(cell.rjust(max(_NARROWEST, len(name))) for cell, name in zip(cells, names, strict=True))
            for cells, (_, names) in zip(groups, _GROUPS, strict=True)
        ]
        return "  ".join([first.ljust(self._first), *padded])


def remarks(measured: Measurement) -> list[str]:
    """Return remarks that qualify the numbers."""
    notes = [] if measured.stable else ["not stable"]
    if measured.dropped:
        notes.append(f"{measured.dropped} dropped")
    if measured.busy > _BUSY:
        notes.append(f"generator busy {measured.busy:.0%}")
    return notes


def number(value: float | None) -> str:
    """Return a number in six characters or less, with three digits or more; "-" for None."""
    if value is None:
        return "-"
    suffix = ""
    for suffix in ("", "k", "M", "G"):  # noqa: B007
        if abs(value) < 99_950:
            break
        value /= 1000
    digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0
    return f"{value:.{digits}f}{suffix}"
