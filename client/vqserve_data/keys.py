"""Keys of items: what they may be, and how they are written where dots have a meaning."""

from __future__ import annotations

import unicodedata

# Of a part between two slashes: file systems allow 255, and suffixes and the names of drafts come on top.
_PART_BYTES = 200


def fault_of_key(key: str) -> str | None:
    """Return what is wrong with a key; None: nothing.

    Each key can be a path below a folder: it leads nowhere else, and file systems can hold its parts.
    """
    try:
        lengths = [len(part.encode()) for part in key.split("/")]
    except UnicodeEncodeError:
        return "the key is not Unicode text"
    for part, length in zip(key.split("/"), lengths, strict=True):
        if part in {"", ".", ".."}:
            return f"the key {key!r} has the part {part!r}"
        if length > _PART_BYTES:
            return f"the key {key[:40]!r}... has a part of {length} bytes, and {_PART_BYTES} is the most"
    if "\\" in key or any(unicodedata.category(character) == "Cc" for character in key):
        return f"the key {key!r} has a backslash or a control character"
    return None


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
