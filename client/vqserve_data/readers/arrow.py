"""Files of Arrow, also called Feather, in both forms: with a directory, and as a stream, as `datasets` saves them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vqserve_data.errors import FileError, MissingLibrary, UnfitSelection
from vqserve_data.items import BadItem, Entry, Record
from vqserve_data.keys import one_line
from vqserve_data.readers.handle import open_source, reason
from vqserve_data.readers.protocol import Selection, SourceFile
from vqserve_data.readers.table import Columns, entries_of_batch, records_of_batch

_MAGIC = b"ARROW1"
_OLD_MAGIC = b"FEA1"
# A row takes a bit at least, but for few.
_HARMLESS_ROWS = 1 << 20


class ArrowReader:
    """Reads .arrow and .feather files batch by batch, as they were written."""

    suffixes = (".arrow", ".feather")

    def entries(self, file: SourceFile, select: Selection) -> Iterator[Entry]:
        """Yield an entry a row; of the columns only that of the keys is read, or the narrowest."""
        try:
            schema = _open(file, None)[0]
            columns = Columns.of(file, schema, select)
        except FileError:
            raise
        except Exception as error:
            raise FileError(f"{file.name}: {one_line(error)}") from error
        first = 0
        try:
            for batch in _open(file, [schema.get_field_index(columns.key or columns.names[0])])[1]:
                _check_rows(file, batch)
                yield from entries_of_batch(file, batch, columns, first)
                first += batch.num_rows
        except Exception as error:
            if not first:
                raise FileError(f"{file.name}: {one_line(error)}") from error
            yield Entry(file.key)

    def read(self, file: SourceFile, select: Selection, *, start: int = 0) -> Iterator[Record]:
        """Yield the rows. Batches in front of `start` are read, but not converted."""
        try:
            schema = _open(file, None)[0]
            columns = Columns.of(file, schema, select)
        except (MissingLibrary, UnfitSelection):
            raise
        except Exception as error:
            yield from [BadItem(file.key, file.name, reason(file, error))][start:]
            return
        first = 0
        try:
            for batch in _open(file, [schema.get_field_index(name) for name in columns.names])[1]:
                _check_rows(file, batch)
                wanted = batch.slice(max(start - first, 0))
                if wanted.num_rows:
                    yield from records_of_batch(file, wanted, columns, first + batch.num_rows - wanted.num_rows)
                first += batch.num_rows
        except Exception as error:
            text = f"it is damaged, and not read on from row {first}: {reason(file, error)}"
            yield from [BadItem(file.key, file.name, text)][max(start - first, 0) :]


def _check_rows(file: SourceFile, batch: Any) -> None:
    """Check that a batch may have so many rows: some columns take no space, so that it could claim any number.

    Raises:
        Exception: its buffers are shorter than it claims, or it has too many rows.
    """
    batch.validate()
    if batch.num_rows > max(_HARMLESS_ROWS, 8 * file.size):
        raise ValueError(f"a batch claims {batch.num_rows} rows in a file of {file.size} bytes")


def _open(file: SourceFile, fields: list[int] | None) -> tuple[Any, Iterator[Any]]:
    """Return the schema and the batches of a file, of these fields only.

    Raises:
        MissingLibrary: there is no pyarrow.
        Exception: it cannot be read.
    """
    try:
        import pyarrow as pa  # noqa: PLC0415
        from pyarrow import ipc  # noqa: PLC0415
    except ImportError as error:
        raise MissingLibrary("reading Arrow files", extra="arrow") from error
    handle = open_source(file)
    magic = handle.read(0, len(_MAGIC))
    if magic.startswith(_OLD_MAGIC):
        raise ValueError("it is of version 1 of Feather: write it again with a newer library")
    # Not mapped: where somebody truncates a mapped file, its readers die.
    source = pa.PythonFile(handle.stream()) if file.path is None else pa.OSFile(str(file.path))
    options = ipc.IpcReadOptions(included_fields=fields)
    if magic != _MAGIC:
        stream = ipc.open_stream(source, options=options)
        return stream.schema, iter(stream)
    whole = ipc.open_file(source, options=options)
    return whole.schema, (whole.get_batch(at) for at in range(whole.num_record_batches))
