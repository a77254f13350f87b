"""Text from outside, in a form that is safe to show in a terminal or a log."""

from __future__ import annotations

LONGEST_NAME = 200


def printable(text: str, most: int | None = None) -> str:
    """Return a text with its control characters escaped.

    Args:
        text: the text.
        most: number of characters to show at most; a longer text is cut, and ends with "...". None: any number.
    """
    part = text[:most]
    if not part.isprintable():
        part = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in part)
    if most is None or max(len(text), len(part)) <= most:
        return part
    return f"{part[:most]}..."


def is_name(text: str) -> bool:
    """Return whether a text from outside can be shown as a name: printable, neither empty nor very long."""
    return 0 < len(text) <= LONGEST_NAME and text.isprintable()
