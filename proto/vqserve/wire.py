"""Reads and writes messages with a payload, without copying the payload.

The payload is field 100. This module writes it last, so that everything before it is a small message of its own, the
head, which protobuf reads and writes. protobuf also reads the other valid forms (fields in any order, the payload
twice). docs/wire.md describes the layout.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import TypeAlias, TypeVar

from google.protobuf.message import DecodeError, Message

PAYLOAD_FIELD = 100
_LENGTH_DELIMITED = 2
_TAG = PAYLOAD_FIELD << 3 | _LENGTH_DELIMITED
# The tag as protobuf writes it: a varint of two bytes.
_PAYLOAD_TAG = bytes((_TAG & 0x7F | 0x80, _TAG >> 7))
_MAX_VARINT_BYTES = 10
# Most bytes of a message beside its payload: names, a digest and a shape are far less. It bounds the time and memory
# that a stranger's message takes before it is known to be valid: protobuf reads so much in less than a millisecond.
MOST_HEAD_BYTES = 64 << 10
# Fields that are read here, in Python, to find the payload. What we write has fewer.
_MOST_FIELDS = 64
# Sizes of values of fixed width, by wire type.
_FIXED_BYTES = {1: 8, 5: 4}
# Bytes of a counter in a ReplyTemplate, and its greatest value: about nine hours in microseconds.
_LEAST_WIDTH = 5
_MOST = (1 << 7 * _LEAST_WIDTH) - 1
_ALIGNMENT = 8

_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.argtypes = (ctypes.c_char_p, ctypes.c_ssize_t)
_new_bytes.restype = ctypes.py_object

Buffer: TypeAlias = bytes | bytearray | memoryview
MessageT = TypeVar("MessageT", bound=Message)


class HeadTooLarge(DecodeError):
    """A message has more than MOST_HEAD_BYTES beside its payload."""


def read(kind: type[MessageT], raw: bytes) -> tuple[MessageT, memoryview]:
    """Return a message without its payload, and the payload, a view of `raw` where it is the last field.

    Raises:
        HeadTooLarge: it has too many bytes beside the payload.
        google.protobuf.message.DecodeError: the bytes are not such a message.
    """
    found = _find_payload(raw)
    if found is None:
        beside = len(raw)
    else:
        head_bytes, start, end = found
        beside = len(raw) - (min(end, len(raw)) - start)
    if beside > MOST_HEAD_BYTES:
        raise HeadTooLarge(f"the message has more than {MOST_HEAD_BYTES} bytes beside its payload")
    if found is not None and _is_last(raw, found):
        return kind.FromString(raw[:head_bytes]), memoryview(raw)[start:]
    message = kind.FromString(raw)
    name = kind.DESCRIPTOR.fields_by_number[PAYLOAD_FIELD].name
    payload: bytes = getattr(message, name)
    message.ClearField(name)
    return message, memoryview(payload)


def payload_span(raw: bytes) -> tuple[int, int] | None:
    """Return the positions at which the head of a message ends and its payload begins.

    None if there is no payload, or if it is not the last field, or occurs twice, or comes after very many fields. The
    head is not checked: protobuf decides whether it is a valid message.
    """
    found = _find_payload(raw)
    return found[:2] if found is not None and _is_last(raw, found) else None


def _is_last(raw: bytes, found: tuple[int, int, int]) -> bool:
    """Return whether the payload ends the message, and its length is written as `payload_tag` does."""
    position, start, end = found
    # protobuf reads a length that has more bytes than it needs; such a length ends in a zero byte.
    return end == len(raw) and bool(raw[start - 1] or start == position + 3)


def _find_payload(raw: bytes) -> tuple[int, int, int] | None:
    """Return where the first payload's tag begins, and the payload begins and ends.

    None if it is not among the first fields, or its tag is not written as `payload_tag` does. The end is beyond `raw`
    if the message is cut off.
    """
    position, size = 0, len(raw)
    for _ in range(_MOST_FIELDS):
        if position >= size:
            return None
        if raw[position : position + 2] == _PAYLOAD_TAG:
            length, start = _varint(raw, position + 2)
            return position, start, start + length
        # Most tags and values have one byte; they are read here, without a call.
        tag = raw[position]
        if tag < 0x80:
            position += 1
        else:
            tag, position = _varint(raw, position)
        kind = tag & 7
        if kind in {0, 2}:
            value = raw[position] if position < size else 0x80
            if value < 0x80:
                position += 1
            else:
                value, position = _varint(raw, position)
            if kind == 2:
                position += value
        elif kind in _FIXED_BYTES:
            position += _FIXED_BYTES[kind]
        else:
            return None
        # The payload's tag has more bytes than it needs; protobuf reads such a message.
        if tag >> 3 == PAYLOAD_FIELD:
            return None
    return None


def payload_tag(nbytes: int) -> bytes:
    """Return the tag and the length before a payload of `nbytes` bytes."""
    return _PAYLOAD_TAG + varint(nbytes)


def varint(value: int) -> bytes:
    """Return a non-negative integer as protobuf writes it."""
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class ReplyTemplate:
    """Messages with the same head and the same size of payload.

    The last field of the head is a submessage of counters, whose values are written at the end. Each counter has a
    fixed width, which protobuf's varints allow, chosen so that the payload begins at a multiple of eight bytes.
    """

    def __init__(self, head: bytes, counters_field: int, counters: int, nbytes: int) -> None:
        """Make the template.

        Args:
            head: all fields before the counters.
            counters_field: field number of the submessage, below 16.
            counters: number of counters; they are the fields 1, 2, and so on.
            nbytes: size of the payload.
        """
        tag = payload_tag(nbytes)
        widths = [_LEAST_WIDTH] * counters
        for i in range(-(len(head) + 2 + sum(widths) + counters + len(tag)) % _ALIGNMENT):
            widths[i % counters] += 1
        body_bytes = sum(widths) + counters
        self.before = head + bytes((counters_field << 3 | _LENGTH_DELIMITED, body_bytes))
        self.after = tag
        # The tags and the bytes of all counters, as one number without the values, and which bit each value begins at.
        fields = [bytes((number << 3,)) + b"\x80" * (width - 1) + b"\0" for number, width in enumerate(widths, 1)]
        self.counters = int.from_bytes(b"".join(fields), "little")
        self.counters_bytes = body_bytes
        self.bits = [8 * (len(b"".join(fields[:i])) + 1) for i in range(counters)]
        self.start = len(self.before) + body_bytes + len(tag)
        self.size = self.start + nbytes


class ReplyBuffer:
    """A message of a template, written in place: first its payload, then its header.

    The payload is computed directly into the memory that is sent.

    Attributes:
        memory: memory of the whole message; the payload begins at the template's `start`.
    """

    def __init__(self, template: ReplyTemplate) -> None:
        # C code makes bytes in this way: they may be written until other code sees them.
        raw: bytes = _new_bytes(None, template.size)
        self.memory = (ctypes.c_ubyte * template.size).from_address(id(raw) + bytes.__basicsize__ - 1)
        # An array in the memory keeps the bytes alive.
        self.memory.owner = raw  # type: ignore[attr-defined]
        self._raw = raw
        self._template = template

    def write_header(self, counters: Iterable[int]) -> bytes:
        """Write everything before the payload, with these non-negative counters, and return the message."""
        template = self._template
        written = template.counters
        for value, bit in zip(counters, template.bits, strict=True):
            written |= (_spread(value) if value >= 0x80 else value) << bit
        counters_raw = written.to_bytes(template.counters_bytes, "little")
        ctypes.memmove(self.memory, template.before + counters_raw + template.after, template.start)
        return self._raw


def _spread(value: int) -> int:
    """Return a counter with room for a varint's mark at the top of each byte."""
    value = min(value, _MOST)
    spread = value & 0x7F | (value & 0x3F80) << 1 | (value & 0x1FC000) << 2
    return spread if value < 0x200000 else spread | (value & 0xFE00000) << 3 | (value & 0x7F0000000) << 4


def _varint(raw: bytes, position: int) -> tuple[int, int]:
    """Return the varint at a position, and its end; the end is beyond `raw` if the varint is cut off or too long."""
    value = shift = 0
    for byte in raw[position : position + _MAX_VARINT_BYTES]:
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    return 0, len(raw) + 1
