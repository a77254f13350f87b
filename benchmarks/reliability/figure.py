"""A figure, and what is asked of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of a scenario's table.

    Attributes:
        what: names it, with its unit.
        value: what was measured; a text where it could not be, or where it is no number.
        at_most: the greatest value that passes.
        at_least: the least value that passes.
        wanted: the text that passes.
    """

    what: str
    value: float | str
    at_most: float | None = None
    at_least: float | None = None
    wanted: str | None = None

    @property
    def asked(self) -> str:
        if self.wanted is not None:
            return self.wanted
        if self.at_most is not None:
            return f"<= {self.at_most:g}"
        return "" if self.at_least is None else f">= {self.at_least:g}"

    @property
    def passed(self) -> bool | None:
        """None: nothing is asked."""
        if not self.asked:
            return None
        if self.wanted is not None or isinstance(self.value, str):
            return self.value == self.wanted
        # NaN, of nothing that was measured, is neither.
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)


def table(figures: Iterable[Figure]) -> str:
    """Return the lines of a table; a text of which nothing is asked is a note, and takes no part in the columns."""
    rows: list[tuple[str, ...]] = [("", "measured", "asked", "")]
    for figure in figures:
        if isinstance(figure.value, str) and figure.passed is None:
            rows.append((f"{figure.what}: {figure.value}",))
            continue
        value = figure.value if isinstance(figure.value, str) else f"{figure.value:.4g}"
        rows.append((figure.what, value, figure.asked, {None: "", True: "pass", False: "FAIL"}[figure.passed]))
    widths = [max(map(len, column)) for column in zip(*(row for row in rows if len(row) > 1), strict=True)]
    lines = []
    for what, *cells in rows:
        if not cells:
            lines.append(f"  {what}")
            continue
        value, asked, verdict = cells
        lines.append(f"  {what:<{widths[0]}}  {value:>{widths[1]}}  {asked:<{widths[2]}}  {verdict}".rstrip())
    return "\n".join(lines)
