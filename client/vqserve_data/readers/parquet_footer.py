"""How much the groups of rows of a Parquet file claim, read from its footer.

pyarrow has these figures, too, but it ends the process where those of a damaged file contradict each other
(`RowGroupMetaData.column` raises a C++ exception that nobody catches). The footer is a struct of Thrift's compact
protocol (https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md); its fields are in
parquet.thrift (https://github.com/apache/parquet-format).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from vqserve_data.readers.handle import Handle

_MAGIC = b"PAR1"
_MAX_FOOTER_BYTES = 256 << 20
_MAX_DEPTH = 32
# Bytes of an element of the physical types BOOLEAN, INT32, INT96 and FLOAT; others have 8, or come with their sizes.
_WIDTHS = {0: 1, 1: 4, 3: 12, 4: 4}


@dataclass(frozen=True, slots=True)
class Chunk:
    """A column in a group of rows.

    Attributes:
        column: name of the column, of nested ones that at the top.
        decoded: bytes that it claims to have decoded.
        held: bytes that it has in the file.
    """

    column: str
    decoded: int
    held: int


def chunks_of_groups(handle: Handle) -> list[list[Chunk]]:
    """Return the chunks of each group of rows.

    Raises:
        ValueError: the footer is damaged.
    """
    tail = handle.read(handle.size - 8, 8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC or length > min(_MAX_FOOTER_BYTES, handle.size - 8):
        raise ValueError("it is no Parquet file, or was cut short")
    try:
        footer = _Compact(handle.read(handle.size - 8 - length, length)).struct()
        return [[_chunk(column[3]) for column in group[1]] for group in footer[4]]
    except (LookupError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError("its footer is damaged") from error


def _chunk(meta: Any) -> Chunk:
    width = _WIDTHS.get(meta[1], 8)
    return Chunk(meta[3][0].decode(), max(meta[5] * width, meta[6]), meta[7])


class _Compact:
    """Reads structs of the compact protocol as dictionaries by number of the field."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._depth = 0

    def struct(self) -> dict[int, Any]:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise ValueError("its footer is nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while (head := self._byte()) != 0:
            number = number + (head >> 4) if head >> 4 else self._zigzag()
            kind = head & 15
            # Of a field of type bool the type is the value.
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind)
        self._depth -= 1
        return fields

    def _value(self, kind: int) -> Any:
        read = self._READERS.get(kind)
        if read is None:
            raise ValueError("its footer is damaged")
        return read(self)

    def _list(self) -> list[Any]:
        head = self._byte()
        size = self._varint() if head >> 4 == 15 else head >> 4
        return [self._value(head & 15) for _ in range(size)]

    def _map(self) -> None:
        """Skip a map; none of the fields that are wanted is one."""
        size = self._varint()
        kinds = self._byte() if size else 0
        for _ in range(size):
            self._value(kinds >> 4)
            self._value(kinds & 15)

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _double(self) -> bytes:
        return self._bytes(8)

    def _binary(self) -> bytes:
        return self._bytes(self._varint())

    def _bytes(self, count: int) -> bytes:
        data = self._data[self._at : self._at + count]
        if len(data) < count:
            raise IndexError
        self._at += count
        return data

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
            if shift > 63:
                raise ValueError("its footer is damaged")
        return value | byte << shift

    def _zigzag(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)

    # By the number of the type.
    _READERS: ClassVar[Mapping[int, Callable[[_Compact], Any]]] = {
        **dict.fromkeys((1, 2, 3), _byte),
        **dict.fromkeys((4, 5, 6), _zigzag),
        7: _double,
        8: _binary,
        **dict.fromkeys((9, 10), _list),
        11: _map,
        12: struct,
    }
