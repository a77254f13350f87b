"""Parquet shards: a column of keys, a column `indices` or `latents` of nested lists, and a column for each field."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vqserve_data.drafts import Draft
from vqserve_data.errors import FileError, MissingLibrary
from vqserve_data.items import Array
from vqserve_data.writers.one_file import OneFile, OneFileWriter, cannot_hold, kind_of
from vqserve_data.writers.protocol import Shard

# Of a group of rows: what is in memory before it is written, and what a reader reads at once.
_GROUP_BYTES = 64 << 20
_GROUP_ROWS = 10_000
# Lists count their elements in 32 bits.
_MOST_ELEMENTS = 2**31 - 1
# Members of WebDataset samples that are text.
_TEXTS = frozenset({"txt", "text", "transcript", "json", "jsn", "cls", "cls2", "index", "inx", "id"})


class ParquetWriter(OneFileWriter):
    """Writes Parquet shards by pyarrow. The metadata is in that of the schema."""

    name = "parquet"
    keeps_fields = True

    def shard(self, folder: Path, number: int, metadata: Mapping[str, str]) -> Shard:
        """Begin a shard.

        Raises:
            MissingLibrary: pyarrow is not installed.
        """
        return _ParquetShard(folder / self.names(number), metadata)


class _ParquetShard(OneFile):
    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self._pa, self._parquet = _library("pyarrow"), _library("pyarrow.parquet")
        super().__init__(path)
        self._metadata = dict(sorted(metadata.items()))
        self._rows: list[tuple[str, Array, Mapping[str, Any]]] = []
        self._row_bytes = 0
        self._kind: tuple[int, np.dtype[Any]] | None = None
        self._writer: Any = None

    def abandon(self) -> None:
        """Remove what was written; after `close` nothing happens."""
        if self._writer is not None:
            # On a full disk it cannot write its footer, and would try again when it is collected.
            with contextlib.suppress(OSError, ValueError):
                self._writer.close()
            self._writer.is_open = False
        super().abandon()

    def _check(self, key: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        kind = (len(shape), dtype.newbyteorder("="))
        if self._kind is None:
            self._kind = kind
        if kind != self._kind:
            axes, before = self._kind
            cannot_hold(
                "parquet", key, f"it is {dtype.name} of {len(shape)} axes, and those before it {before} of {axes}"
            )
        if 0 in shape[:-1]:
            cannot_hold("parquet", key, f"its shape is {shape}, and lists without elements have no shape")
        if math.prod(shape) > _MOST_ELEMENTS:
            cannot_hold("parquet", key, f"it has more than {_MOST_ELEMENTS} elements")

    def _write(self, key: str, array: Array, fields: Mapping[str, Any]) -> None:
        nbytes = array.nbytes + sum(len(value) for value in fields.values() if isinstance(value, bytes | str))
        if self._rows and (self._row_bytes + nbytes > _GROUP_BYTES or len(self._rows) == _GROUP_ROWS):
            self._write_group()
        self._rows.append((key, array, fields))
        self._row_bytes += nbytes

    def _finish(self) -> None:
        if self._rows or self._writer is None:
            self._write_group()
        self._writer.close()

    def _write_group(self) -> None:
        table = self._table()
        if self._writer is None:
            self._begin(table.schema)
        elif table.schema != self._writer.schema:
            schema = self._united(self._writer.schema, table.schema)
            if schema != self._writer.schema:
                self._write_again(schema)
            table = self._conform(table, schema)
        self._writer.write_table(table)
        self._rows.clear()
        self._row_bytes = 0

    def _begin(self, schema: Any) -> None:
        self._writer = self._parquet.ParquetWriter(self._file, schema.with_metadata(self._metadata))

    def _write_again(self, schema: Any) -> None:
        """Write what is there with another schema: the fields of later items have other names or types."""
        self._writer.close()
        self._file.close()
        before = Draft.of(self._draft.path.with_name(f"{self._draft.path.name}.before"))
        try:
            self._draft.file.replace(before.file)
            self._file = self._draft.open()
            self._begin(schema)
            with self._parquet.ParquetFile(before.file) as groups:
                for group in range(groups.num_row_groups):
                    self._writer.write_table(self._conform(groups.read_row_group(group), schema))
        finally:
            before.remove()

    def _table(self) -> Any:
        """Return the rows as a table."""
        columns = {"key": self._pa.array([key for key, _, _ in self._rows], self._pa.string())}
        if self._rows:
            arrays = [array for _, array, _ in self._rows]
            columns[kind_of(arrays[0].dtype)] = self._lists(arrays)
        for name in dict.fromkeys(name for _, _, fields in self._rows for name in fields):
            values = [_plain(name, fields.get(name)) for _, _, fields in self._rows]
            if name == "key" and values == columns["key"].to_pylist():
                # From a table of ours.
                continue
            column = name
            while column in columns:
                column += "_"
            with self._fitting(f"the values of {name}"):
                columns[column] = self._pa.array(values)
        return self._pa.table(columns).replace_schema_metadata(self._metadata)

    def _lists(self, arrays: Sequence[Array]) -> Any:
        """Return a column of nested lists."""
        shapes = np.array([array.shape for array in arrays], np.int64).reshape(len(arrays), -1)
        column = self._pa.array(np.concatenate([array.reshape(-1) for array in arrays]))
        for axis in range(shapes.shape[1] - 1, -1, -1):
            lengths = np.repeat(shapes[:, axis], shapes[:, :axis].prod(axis=1))
            ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            column = self._pa.ListArray.from_arrays(self._pa.array(ends), column)
        return column

    def _united(self, first: Any, second: Any) -> Any:
        with self._fitting("the fields of the items"):
            return self._pa.unify_schemas([first, second], promote_options="permissive")

    def _conform(self, table: Any, schema: Any) -> Any:
        with self._fitting("the fields of the items"):
            columns = [
                table[field.name].cast(field.type)
                if field.name in table.column_names
                else self._pa.nulls(len(table), field.type)
                for field in schema
            ]
            return self._pa.table(columns, schema=schema)

    @contextlib.contextmanager
    def _fitting(self, what: str) -> Any:
        try:
            yield
        except (self._pa.ArrowException, TypeError, OverflowError) as error:
            reason = str(error).splitlines()[0]
            raise FileError(f"--format parquet cannot hold {what}: they are not of one type: {reason}") from error


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingLibrary("--format parquet", extra="arrow") from error


def _plain(name: str, value: Any) -> Any:
    """Return a value that Arrow takes; text that is a member of a WebDataset sample becomes text."""
    match value:
        case np.ndarray() | np.generic():
            return value.tolist()
        case bytes() if name.rpartition(".")[2] in _TEXTS:
            return value.decode(errors="backslashreplace")
        case _:
            return value
