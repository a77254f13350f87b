"""The names of samples in a tar as WebDataset reads it, where a name ends at the first dot of its last part."""

from __future__ import annotations


def sample_of(key: str) -> str:
    """Return the name of the sample of an item.

    A dot in the last part of the key is written %2E and a percent sign %25; most keys have neither.
    """
    folder, slash, last = key.rpartition("/")
    return f"{folder}{slash}{last.replace('%', '%25').replace('.', '%2E')}"


def key_of(sample: str) -> str:
    """Return the key of a sample of ours; the inverse of `sample_of`."""
    folder, slash, last = sample.rpartition("/")
    return f"{folder}{slash}{last.replace('%2E', '.').replace('%25', '%')}"
