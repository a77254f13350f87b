"""Messages taken apart and put together around their payload, so that it is never copied on the way.

A message with a payload has it in field 100, and whoever writes with this module has it last: what comes before is the
head, a small message of its own that protobuf reads and writes. Messages of other shapes, which protobuf allows just as
well (fields in any order, the payload twice), are left to protobuf. docs/wire.md has the layout.
"""

from __future__ import annotations

from typing import TypeAlias, TypeVar

from google.protobuf.message import Message

PAYLOAD_FIELD = 100
_LENGTH_DELIMITED = 2
_TAG = PAYLOAD_FIELD << 3 | _LENGTH_DELIMITED
# As protobuf writes it: a varint of two bytes.
_PAYLOAD_TAG = bytes((_TAG & 0x7F | 0x80, _TAG >> 7))
_MAX_VARINT_BYTES = 10

Buffer: TypeAlias = bytes | bytearray | memoryview
MessageT = TypeVar("MessageT", bound=Message)


def read(kind: type[MessageT], raw: bytes) -> tuple[MessageT, memoryview]:
    """Return a message without its payload, and the payload, a view of `raw` where it is the last field.

    Raises:
        google.protobuf.message.DecodeError: the bytes are no such message.
    """
    start = payload_start(raw)
    if start is None:
        message = kind.FromString(raw)
        name = kind.DESCRIPTOR.fields_by_number[PAYLOAD_FIELD].name
        payload: bytes = getattr(message, name)
        message.ClearField(name)
        return message, memoryview(payload)
    return kind.FromString(raw[: start - len(payload_tag(len(raw) - start))]), memoryview(raw)[start:]


def payload_start(raw: bytes) -> int | None:
    """Return where the payload of a message begins, if it is the message's last field and no other one comes twice.

    What comes before it, without the payload's tag and length, may be anything: whether it is a valid message is for
    protobuf to say. None: there is no payload, or it is not last.
    """
    position, size = 0, len(raw)
    while position < size:
        if raw[position : position + 2] == _PAYLOAD_TAG:
            length, start = _varint(raw, position + 2)
            # A length in more bytes than it needs is protobuf's to judge.
            is_plain = start - position == 2 + len(varint(length))
            return start if is_plain and start + length == size else None
        tag, position = _varint(raw, position)
        kind = tag & 7
        if kind == 0:
            _, position = _varint(raw, position)
        elif kind == 1:
            position += 8
        elif kind == 2:
            length, position = _varint(raw, position)
            position += length
        elif kind == 5:
            position += 4
        else:
            return None
        # The payload's tag in more bytes than it needs, which protobuf reads as well.
        if tag >> 3 == PAYLOAD_FIELD:
            return None
    return None


def payload_tag(nbytes: int) -> bytes:
    """Return what a payload of that many bytes is preceded by."""
    return _PAYLOAD_TAG + varint(nbytes)


def message(head: Buffer, payload: Buffer, nbytes: int) -> bytes:
    """Return the message of a head and a payload of `nbytes` bytes, which is copied once."""
    return b"".join((head, _PAYLOAD_TAG, varint(nbytes), payload))


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


def submessage(field: int, body: bytes) -> bytes:
    """Return a field below 16 that holds a message of less than 128 bytes."""
    return bytes((field << 3 | _LENGTH_DELIMITED, len(body))) + body


def _varint(raw: bytes, position: int) -> tuple[int, int]:
    """Return the varint at a position and where it ends; beyond the end of `raw` if it is cut off or too long."""
    value = shift = 0
    for byte in raw[position : position + _MAX_VARINT_BYTES]:
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    return 0, len(raw) + 1
