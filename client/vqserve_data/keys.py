"""Keys of items: what they may be, since names of strangers become paths, and how a tar writes them."""

from __future__ import annotations

import re

# Of a part between two slashes: file systems allow 255, and suffixes and the names of drafts come on top.
MAX_PART_BYTES = 200
# Of a whole key: paths have at most 4096, with the folder in front of it.
MAX_KEY_BYTES = 2000
# Control characters, the backslash, and halves of surrogate pairs, which no encoding can hold.
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\\\ud800-\udfff]")
_DOTS = frozenset({"", ".", ".."})
_LONGEST_QUOTED = 80


def problem_of(key: str) -> str | None:
    """Return what is wrong with a key; None: nothing."""
    if _FORBIDDEN.search(key):
        return "has a control character or a backslash"
    if len(key) > MAX_KEY_BYTES // 4 and len(key.encode()) > MAX_KEY_BYTES:
        return f"has more than {MAX_KEY_BYTES} bytes"
    for part in key.split("/"):
        if part in _DOTS:
            return f"has a part {part!r} between slashes"
        if len(part) > MAX_PART_BYTES // 4 and len(part.encode()) > MAX_PART_BYTES:
            return f"has a part of more than {MAX_PART_BYTES} bytes"
    return None


def quoted(name: str) -> str:
    """Return a stranger's name for a text, on one line and not long."""
    text = ascii(name)[1:-1]
    return text if len(text) <= _LONGEST_QUOTED else f"{text[:_LONGEST_QUOTED]}..."


def one_line(error: BaseException) -> str:
    """Return what an error says on one line; its type if it says nothing."""
    text = " ".join(str(error).split())
    return text[:400] if text else type(error).__name__


def sample_of(key: str) -> str:
    """Return the name of an item's sample in a tar, where the name of a member ends at the first dot of its last part.

    A dot there is written %2E and a percent sign %25; most keys have neither.
    """
    folder, slash, last = key.rpartition("/")
    return f"{folder}{slash}{last.replace('%', '%25').replace('.', '%2E')}"


def key_of(sample: str) -> str:
    """Return the key whose sample has this name; the inverse of `sample_of`."""
    folder, slash, last = sample.rpartition("/")
    return f"{folder}{slash}{last.replace('%2E', '.').replace('%25', '%')}"
