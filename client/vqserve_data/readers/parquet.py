"""Files of Parquet: each row is an item."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vqserve_data.errors import FileError, MissingLibrary, UnfitSelection
from vqserve_data.items import BadItem, Entry, Record
from vqserve_data.keys import one_line
from vqserve_data.readers.handle import MOST_OF_A_BYTE, open_source, reason
from vqserve_data.readers.protocol import Selection, SourceFile
from vqserve_data.readers.table import Columns, entries_of_batch, key_of_row, records_of_batch

# Rows that are decoded at once.
_BATCH_BYTES = 8 << 20
_MAX_BATCH_ROWS = 1 << 14
# A group of rows may claim so much, however few bytes it has.
_HARMLESS_BYTES = 64 << 20
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT96": 12}


class ParquetReader:
    """Reads .parquet files batch by batch."""

    suffixes = (".parquet",)

    def entries(self, file: SourceFile, select: Selection) -> Iterator[Entry]:
        """Yield an entry a row; of the columns only that of the keys is read."""
        try:
            table = _open(file)
            columns = Columns.of(file, table.schema_arrow, select)
        except FileError:
            raise
        except Exception as error:
            raise FileError(f"{file.name}: {one_line(error)}") from error
        if columns.key is None:
            for number in range(table.metadata.num_rows):
                yield Entry(key_of_row(file, number), *columns.look)
            return
        first = 0
        try:
            for batch in table.iter_batches(_MAX_BATCH_ROWS, columns=[columns.key]):
                yield from entries_of_batch(file, batch, columns, first)
                first += batch.num_rows
        except Exception as error:
            raise FileError(f"{file.name}: its keys cannot be read: {one_line(error)}") from error

    def read(self, file: SourceFile, select: Selection, *, start: int = 0) -> Iterator[Record]:
        """Yield the rows; groups of rows in front of `start` are not read."""
        try:
            table = _open(file)
            columns = Columns.of(file, table.schema_arrow, select)
        except (MissingLibrary, UnfitSelection):
            raise
        except Exception as error:
            yield from [BadItem(file.key, file.name, reason(file, error))][start:]
            return
        first = 0
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if first + rows > start:
                yield from _read_group(file, table, columns, group, first=first, skipped=max(start - first, 0))
            first += rows


def _open(file: SourceFile) -> Any:
    try:
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise MissingLibrary("reading Parquet", extra="arrow") from error
    return parquet.ParquetFile(open_source(file).stream() if file.path is None else str(file.path))


def _read_group(
    file: SourceFile, table: Any, columns: Columns, group: int, *, first: int, skipped: int
) -> Iterator[Record]:
    """Yield the rows of a group, but the first ones; `first` is the number of its first row."""
    rows = table.metadata.row_group(group).num_rows
    done = 0
    try:
        size = _rows_of_batch(table.metadata.row_group(group), columns)
        for batch in table.iter_batches(size, row_groups=[group], columns=list(columns.names)):
            wanted = batch.slice(max(skipped - done, 0))
            yield from records_of_batch(file, wanted, columns, first + done + batch.num_rows - wanted.num_rows)
            done += batch.num_rows
    except Exception as error:
        text = one_line(error)
        for number in range(max(done, skipped), rows):
            yield BadItem(key_of_row(file, first + number), file.name, f"its group of rows is damaged: {text}")


def _rows_of_batch(group: Any, columns: Columns) -> int:
    """Return how many rows to decode at once.

    Raises:
        ValueError: the group claims more than its bytes can hold.
    """
    decoded = held = 0
    for index in range(group.num_columns):
        column = group.column(index)
        if column.path_in_schema.split(".")[0] in columns.names:
            width = _WIDTHS.get(column.physical_type, 8)
            decoded += max(column.num_values * width, column.total_uncompressed_size)
            held += column.total_compressed_size
    if decoded > max(_HARMLESS_BYTES, held * MOST_OF_A_BYTE):
        raise ValueError(f"it claims {decoded} bytes in {held}, more than numbers can be packed")
    rows: int = max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES * group.num_rows // max(1, decoded)))
    return rows
