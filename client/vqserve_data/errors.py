"""What can be wrong with files; each text says which file, what is wrong, and what to do."""

from __future__ import annotations


class FileError(Exception):
    """A file cannot be used; the text names it."""


class UnfitSelection(FileError):
    """The selection of arrays does not fit a file, such as a column that it does not have."""


class MissingLibrary(FileError):
    """A format needs a library that is not installed; the text has the install command."""

    def __init__(self, what: str, *, extra: str) -> None:
        super().__init__(f"{what} needs a library that is not installed: pip install 'vqserve[{extra}]'")
