"""Files of formats that no reader knows, such as pictures and recordings: their bytes, for a function of the user."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from vqserve_data.errors import FileError
from vqserve_data.items import BadItem, Entry, RawItem, Record
from vqserve_data.keys import one_line
from vqserve_data.readers.protocol import Selection, SourceFile
from vqserve_data.remote import path_of


class RawReader:
    """Gives each file as one RawItem."""

    suffixes: tuple[str, ...] = ()

    def entries(self, file: SourceFile, select: Selection) -> Iterator[Entry]:
        """Yield the file's entry."""
        yield Entry(file.key)

    def read(self, file: SourceFile, select: Selection, *, start: int = 0) -> Iterator[Record]:
        """Yield the file's bytes.

        Raises:
            FileError: raw items are not selected.
        """
        if not select.raw:
            raise FileError(f"{file.name}: no reader knows its suffix")
        if start:
            return
        try:
            with file.open() as opened:
                content = opened.read()
        except Exception as error:
            # A remote store raises errors of its own.
            yield BadItem(file.key, file.name, one_line(error))
            return
        suffix = PurePosixPath(path_of(file.name)).suffix
        yield RawItem(file.key, file.name, {suffix.lower().removeprefix("."): content})
