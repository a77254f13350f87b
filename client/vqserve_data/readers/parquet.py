"""Files of Parquet: each row is an item."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vqserve_data.errors import FileError, MissingLibrary, UnfitSelection
from vqserve_data.items import BadItem, Entry, Record
from vqserve_data.keys import one_line
from vqserve_data.readers.handle import MOST_OF_A_BYTE, open_source, reason
from vqserve_data.readers.parquet_footer import Chunk, chunks_of_groups
from vqserve_data.readers.protocol import Selection, SourceFile
from vqserve_data.readers.table import Columns, entries_of_batch, key_of_row, records_of_batch

# Rows that are decoded at once.
_BATCH_BYTES = 8 << 20
_BUFFER_BYTES = 4 << 20
_MAX_BATCH_ROWS = 1 << 14
# A group of rows may claim so much, however few bytes it has.
_HARMLESS_BYTES = 64 << 20


class ParquetReader:
    """Reads .parquet files batch by batch."""

    suffixes = (".parquet",)

    def entries(self, file: SourceFile, select: Selection) -> Iterator[Entry]:
        """Yield an entry a row; of the columns only that of the keys is read."""
        try:
            table, chunks = _open(file)
            columns = Columns.of(file, table.schema_arrow, select)
            _batch_rows(table, chunks, columns)
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
            table, chunks = _open(file)
            columns = Columns.of(file, table.schema_arrow, select)
            batch_rows = _batch_rows(table, chunks, columns)
        except (MissingLibrary, UnfitSelection):
            raise
        except Exception as error:
            yield from [BadItem(file.key, file.name, reason(file, error))][start:]
            return
        first = 0
        for group, most in enumerate(batch_rows):
            rows = table.metadata.row_group(group).num_rows
            if first + rows > start:
                batches = table.iter_batches(most, row_groups=[group], columns=list(columns.names))
                yield from _read_group(file, batches, columns, range(first, first + rows), start)
            first += rows


def _open(file: SourceFile) -> tuple[Any, list[list[Chunk]]]:
    """Return a file as pyarrow has it, and the chunks of its groups of rows."""
    try:
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise MissingLibrary("reading Parquet", extra="arrow") from error
    handle = open_source(file)
    source = handle.stream() if file.path is None else str(file.path)
    # Without a buffer, or read in advance, a column of a group is in memory as a whole.
    table = parquet.ParquetFile(source, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)
    return table, chunks_of_groups(handle)


def _read_group(
    file: SourceFile, batches: Iterator[Any], columns: Columns, rows: range, start: int
) -> Iterator[Record]:
    """Yield the rows of a group from number `start` on."""
    first = rows.start
    try:
        for batch in batches:
            wanted = batch.slice(max(start - first, 0))
            first += batch.num_rows
            yield from records_of_batch(file, wanted, columns, first - wanted.num_rows)
    except Exception as error:
        text = one_line(error)
        for number in range(max(first, start), rows.stop):
            yield BadItem(key_of_row(file, number), file.name, f"its group of rows is damaged: {text}")


def _batch_rows(table: Any, chunks: Sequence[Sequence[Chunk]], columns: Columns) -> list[int]:
    """Return of each group how many rows to decode at once.

    Raises:
        ValueError: a group claims more than its bytes can hold.
    """
    batch_rows = []
    for group, own in enumerate(chunks):
        rows = table.metadata.row_group(group).num_rows
        wanted = [chunk for chunk in own if chunk.column in columns.names]
        decoded = sum(chunk.decoded for chunk in wanted)
        held = sum(chunk.held for chunk in wanted)
        if decoded > max(_HARMLESS_BYTES, held * MOST_OF_A_BYTE) or not 0 <= rows <= decoded:
            raise ValueError(
                f"a group of {rows} rows claims {decoded} bytes in {held}, more than numbers can be packed, or less"
            )
        batch_rows.append(max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES * rows // max(1, decoded))))
    return batch_rows
