"""Text of a stranger's file on a terminal or in a log."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return text in which nothing that a file says of itself can move a terminal's cursor."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
