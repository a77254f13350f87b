"""Files of one array, as numpy.save writes them."""

from __future__ import annotations

from collections.abc import Iterator

from vqserve_data.errors import FileError
from vqserve_data.items import Entry, Record, SourceArray
from vqserve_data.keys import one_line
from vqserve_data.readers.handle import item_or_bad, npy_header, open_source, stored_npy
from vqserve_data.readers.protocol import Selection, SourceFile


class NpyReader:
    """Reads .npy files: each is one item."""

    suffixes = (".npy",)

    def entries(self, file: SourceFile, select: Selection) -> Iterator[Entry]:
        """Yield the array's entry."""
        handle = open_source(file)
        try:
            shape, _, dtype, _ = npy_header(handle, 0, handle.size)
        except Exception as error:
            raise FileError(f"{file.name}: {one_line(error)}") from error
        yield Entry(file.key, shape, dtype)

    def read(self, file: SourceFile, select: Selection, *, start: int = 0) -> Iterator[Record]:
        """Yield the array."""

        def array() -> SourceArray:
            handle = open_source(file)
            return stored_npy(handle, 0, handle.size)

        if not start:
            yield item_or_bad(file.key, file, array)
