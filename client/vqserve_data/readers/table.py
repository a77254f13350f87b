"""Rows of Arrow tables as items: lists of lists of numbers, of whichever of Arrow's types, as arrays.

A batch of rows is converted at once, so that a small row costs microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vqserve_data.errors import UnfitSelection
from vqserve_data.items import Array, BadItem, Entry, Item, RawItem, Record
from vqserve_data.keys import one_line, problem_of, quoted
from vqserve_data.readers.protocol import Selection, SourceFile

_ROW_DIGITS = 8


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are read.

    Attributes:
        array: name of that with the arrays; None: rows are wanted as they are.
        key: name of that with the keys; None: rows have numbers.
        names: names of all that are read, in the order of the table.
        look: shape and element type of all arrays, None where they differ or may.
    """

    array: str | None
    key: str | None
    names: tuple[str, ...]
    look: tuple[tuple[int, ...] | None, np.dtype[Any] | None]

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the columns that are fields."""
        return tuple(name for name in self.names if name != self.array)

    @classmethod
    def of(cls, file: SourceFile, schema: Any, select: Selection) -> Columns:
        """Choose columns.

        Raises:
            UnfitSelection: the selection does not fit the table.
            Exception: the names of its columns cannot be read.
        """
        names: list[str] = list(schema.names)
        for name in (select.column, select.key):
            if name is not None and names.count(name) != 1:
                what = "no column" if name not in names else "several columns"
                raise UnfitSelection(f"{file.name}: {what} {quoted(name)!r}; it has {_listed(schema, names)}")
        array = None if select.raw else select.column or _only_array(file, schema, names)
        if array is not None and not is_array(schema.field(array).type):
            raise UnfitSelection(
                f"{file.name}: column {quoted(array)!r} has no lists of numbers: {_listed(schema, [array])}"
            )
        every = select.fields or select.raw
        read = [name for name in names if name in (array, select.key) or (every and names.count(name) == 1)]
        look = (None, None) if array is None else _look(schema.field(array).type)
        return cls(array, select.key, tuple(read), look)


def _only_array(file: SourceFile, schema: Any, names: Sequence[str]) -> str:
    found = [name for name in names if names.count(name) == 1 and is_array(schema.field(name).type)]
    if len(found) != 1:
        what = "several columns have" if found else "no column has"
        raise UnfitSelection(
            f"{file.name}: {what} lists of numbers: name one with --column; it has {_listed(schema, names)}"
        )
    return found[0]


def _listed(schema: Any, names: Sequence[str]) -> str:
    shown = [f"{quoted(name)} ({quoted(str(schema.field(names.index(name)).type))})" for name in names[:8]]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")


def is_array(kind: Any) -> bool:
    """Return whether a column of this Arrow type has lists of numbers."""
    kind = _storage_type(kind)
    if not _is_list(kind):
        return False
    while _is_list(kind):
        kind = _storage_type(kind.value_type)
    return _is_number(kind)


def _storage_type(kind: Any) -> Any:
    return getattr(kind, "storage_type", kind)


def _is_list(kind: Any) -> bool:
    from pyarrow import types  # noqa: PLC0415

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_number(kind: Any) -> bool:
    from pyarrow import types  # noqa: PLC0415

    return bool(types.is_integer(kind) or types.is_floating(kind))


def _look(kind: Any) -> tuple[tuple[int, ...] | None, np.dtype[Any]]:
    """Return the shape and the element type of arrays of an Arrow type; None: their shapes differ, or may."""
    is_tensor = _is_tensor(kind)
    shape: list[int] | None = _logical(kind, kind.shape) if is_tensor else []
    while _is_list(kind := _storage_type(kind)):
        if not is_tensor and shape is not None:
            shape = [*shape, kind.list_size] if hasattr(kind, "list_size") else None
        kind = kind.value_type
    return None if shape is None else tuple(shape), np.dtype(kind.to_pandas_dtype())


def _logical(kind: Any, shape: Sequence[int]) -> list[int]:
    """Return the axes of a tensor in the order that it is meant to have, which may not be that in memory.

    As the specification has it (https://arrow.apache.org/docs/format/CanonicalExtensions.html); pyarrow 26 itself gives
    other numbers for a permutation that is not its own inverse.
    """
    return [shape[axis] for axis in kind.permutation or range(len(shape))]


def _is_tensor(kind: Any) -> bool:
    return getattr(kind, "extension_name", "") == "arrow.fixed_shape_tensor"


def entries_of_batch(file: SourceFile, batch: Any, columns: Columns, first: int) -> Iterator[Entry]:
    """Yield the entries of a batch that has the column of keys; `first` is the number of its first row."""
    try:
        batch.validate(full=True)
        keys = [key for key, _ in _keys(file, batch, columns, first)]
    except Exception:
        if batch.num_rows == 1:
            yield Entry(key_of_row(file, first), *columns.look)
            return
        for row in range(batch.num_rows):
            yield from entries_of_batch(file, batch.slice(row, 1), columns, first + row)
        return
    for key in keys:
        yield Entry(key, *columns.look)


def _keys(file: SourceFile, batch: Any, columns: Columns, first: int) -> Iterator[tuple[str, str | None]]:
    """Yield the key of each row, and what is wrong with it (None: nothing); `first` is the number of the first row."""
    if columns.key is None:
        for number in range(first, first + batch.num_rows):
            yield key_of_row(file, number), None
        return
    for number, value in enumerate(_column(batch, columns.key).to_pylist(), first):
        text = str(value) if isinstance(value, str | int) else ""
        problem = problem_of(text)
        if problem is None:
            yield f"{file.key}/{text}", None
        else:
            yield key_of_row(file, number), f"its key {quoted(text)!r} {problem}" if text else "it has no key"


def key_of_row(file: SourceFile, number: int) -> str:
    """Return the key of a row that has no key of its own."""
    return f"{file.key}/{number:0{_ROW_DIGITS}}"


def records_of_batch(file: SourceFile, batch: Any, columns: Columns, first: int) -> Iterator[Record]:
    """Yield the rows of a batch of the columns that were chosen; `first` is the number of its first row."""
    try:
        # Nothing else compares the offsets in a file with the lengths of what they point into.
        batch.validate(full=True)
        records = list(_records(file, batch, columns, first))
    except Exception as error:
        if batch.num_rows == 1:
            yield BadItem(key_of_row(file, first), file.name, one_line(error))
            return
        # One row is enough to spoil a batch, such as one of text that is no UTF-8.
        for row in range(batch.num_rows):
            yield from records_of_batch(file, batch.slice(row, 1), columns, first + row)
        return
    yield from records


def _records(file: SourceFile, batch: Any, columns: Columns, first: int) -> Iterator[Record]:
    keys = _keys(file, batch, columns, first)
    fields = _fields(batch, columns)
    if columns.array is None:
        for (key, problem), own in zip(keys, fields, strict=True):
            yield RawItem(key, file.name, own) if problem is None else BadItem(key, file.name, problem)
        return
    for (key, problem), own, array in zip(keys, fields, _arrays(_column(batch, columns.array)), strict=True):
        if problem is not None:
            yield BadItem(key, file.name, problem)
        elif isinstance(array, str):
            yield BadItem(key, file.name, array)
        else:
            yield Item(key, array, file.name, own)


def _column(batch: Any, name: str) -> Any:
    return batch.column(batch.schema.get_field_index(name))


def _fields(batch: Any, columns: Columns) -> Iterator[dict[str, Any]]:
    """Yield the fields of each row: all columns but that of the arrays."""
    names = columns.fields
    if not names:
        for _ in range(batch.num_rows):
            yield {}
        return
    for row in zip(*(_values(_column(batch, name)) for name in names), strict=True):
        yield dict(zip(names, row, strict=True))


def _values(column: Any) -> Sequence[Any]:
    """Return the values of a column as Python has them; lists of numbers as arrays where they are such."""
    if is_array(column.type):
        arrays = list(_arrays(column))
        if not any(isinstance(array, str) for array in arrays):
            return arrays
    values: list[Any] = column.to_pylist()
    return values


def _arrays(column: Any) -> Iterator[Array | str]:
    """Yield the array of each row of a column; of a bad row what is wrong with it.

    Raises:
        ValueError: the column is inconsistent.
    """
    kind = column.type
    tensor = tuple(kind.shape) if _is_tensor(kind) else None
    order = kind.permutation if tensor is not None else None
    rows = len(column)
    # Of each row the range of its lists of a level, and after the last level of its elements.
    starts, stops = np.arange(rows), np.arange(1, rows + 1)
    has_null = np.zeros(rows, bool)
    is_ragged = np.zeros(rows, bool)
    lengths_of_axes = []
    while _is_list((column := getattr(column, "storage", column)).type):
        has_null |= _any_null(column, starts, stops)
        offsets = _offsets(column)
        least, most = _extremes(np.diff(offsets), starts, stops)
        is_ragged |= least != most
        lengths_of_axes.append(most)
        starts, stops = offsets[starts], offsets[stops]
        column = column.values
    has_null |= _any_null(column, starts, stops)
    elements = _elements(column)
    shapes = np.stack(lengths_of_axes, axis=1).tolist() if tensor is None else [tensor] * rows
    for null, ragged, start, stop, shape in zip(
        has_null.tolist(), is_ragged.tolist(), starts.tolist(), stops.tolist(), shapes, strict=True
    ):
        if null:
            yield "it has an element or a list that is null"
        elif ragged:
            yield "its lists have different lengths"
        else:
            # A copy: a view would keep the whole batch.
            array = elements[start:stop].reshape(shape).copy()
            yield array if order is None else array.transpose(order)


def _offsets(column: Any) -> npt.NDArray[np.int64]:
    """Return where in its values each list of a column begins, and where the last one ends."""
    if hasattr(column.type, "list_size"):
        offsets: npt.NDArray[np.int64] = (np.arange(len(column) + 1) + column.offset) * column.type.list_size
    else:
        offsets = column.offsets.to_numpy().astype(np.int64)
    if offsets[0] < 0 or offsets[-1] > len(column.values) or (np.diff(offsets) < 0).any():
        raise ValueError("its lists are not where it says")
    return offsets


def _extremes(
    lengths: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the least and the greatest of the lengths of each row; the rows follow each other."""
    least, most = np.zeros_like(starts), np.zeros_like(starts)
    filled = stops > starts
    if filled.any():
        within = lengths[: stops[-1]]
        least[filled] = np.minimum.reduceat(within, starts[filled])
        most[filled] = np.maximum.reduceat(within, starts[filled])
    return least, most


def _any_null(column: Any, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    if not column.null_count:
        return np.zeros(len(starts), bool)
    counts = np.concatenate([[0], np.cumsum(column.is_null().to_numpy(zero_copy_only=False))])
    any_null: npt.NDArray[np.bool_] = counts[stops] > counts[starts]
    return any_null


def _elements(column: Any) -> Array:
    dtype = np.dtype(column.type.to_pandas_dtype())
    data = column.buffers()[1]
    if data is None:
        return np.empty(0, dtype)
    return np.frombuffer(data, dtype, len(column), column.offset * dtype.itemsize)
