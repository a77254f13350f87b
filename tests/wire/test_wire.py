"""The codec that copies no payload, against protobuf itself: 10^5 messages, or as many as --wire-cases says."""

from __future__ import annotations

import random

import numpy as np
import pytest
from google.protobuf.message import DecodeError

from vqserve import wire
from vqserve.v1 import tokenizer_pb2 as pb

KINDS = {
    pb.EncodeRequest: "latents",
    pb.EncodeResponse: "indices",
    pb.DecodeRequest: "indices",
    pb.DecodeResponse: "latents",
}


def by_protobuf(kind, raw):
    """What protobuf makes of bytes: the message without its payload, and the payload; None: no message."""
    try:
        message = kind.FromString(raw)
    except DecodeError:
        return None
    payload = getattr(message, KINDS[kind])
    message.ClearField(KINDS[kind])
    return message, payload


def by_the_codec(kind, raw):
    try:
        message, payload = wire.read(kind, raw)
    except DecodeError:
        return None
    return message, bytes(payload)


def check(kind, raw):
    expected, got = by_protobuf(kind, raw), by_the_codec(kind, raw)
    assert got == expected, (kind.DESCRIPTOR.name, raw.hex())
    if got is not None:
        # What a codec dropped would still be equal as far as known fields go.
        assert got[0].SerializeToString(deterministic=True) == expected[0].SerializeToString(deterministic=True)


def a_message(rng: random.Random):
    kind = rng.choice(list(KINDS))
    message = kind(**{KINDS[kind]: rng.randbytes(rng.choice((0, 1, 5, 127, 128, 300)))})
    if rng.random() < 0.8:
        message.dtype = rng.choice((1, 2, 9, 77))
    if rng.random() < 0.8:
        message.shape.extend(rng.choice((0, 1, 200, 1 << 40)) for _ in range(rng.randrange(6)))
    if kind in (pb.EncodeRequest, pb.DecodeRequest):
        message.codebook = rng.choice(("", "a", "vqgan-f16", "é" * 70))
        message.expected_digest = rng.choice(("", "f" * 64))
    else:
        message.digest = rng.choice(("", "0" * 64))
        message.stats.total_us = rng.choice((0, 7, 1 << 50))
    return kind, message


def fields_of(raw: bytes) -> list[bytes]:
    """The top-level fields of a well-formed message of varints and length-delimited fields."""
    fields, start, position = [], 0, 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = raw[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(raw):
        if varint() & 7 == 2:
            length = varint()
            position += length
        else:
            varint()
        fields.append(raw[start:position])
        start = position
    return fields


STRANGE_FIELDS = (
    b"\x98\x01\x07",  # field 19, a varint: unknown
    b"\x9d\x01abcd",  # field 19, 32 bits
    b"\x99\x01abcdefgh",  # field 19, 64 bits
    b"\x9a\x01\x03abc",  # field 19, bytes
    b"\x9b\x01\x08\x01\x9c\x01",  # field 19, a group
    b"\xa2\x06\x02zz",  # the payload again
    b"\xa2\x06\x00",  # an empty one
    b"\xa0\x06\x05",  # the payload's number on a varint
    b"\xa2\x86\x00\x02yy",  # the payload's tag in three bytes
    b"\xa2\x06\x82\x00yy",  # its length in two
    b"\x00",  # field 0
    b"\x0a\x02\xff\xff",  # no UTF-8
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # a tag of eleven bytes
    b"\xa2\x06\xff\xff\xff\xff\x0f",  # a payload of 4 GiB
)


def shuffled(rng: random.Random, raw: bytes) -> bytes:
    fields = fields_of(raw)
    rng.shuffle(fields)
    return b"".join(fields)


def with_a_strange_field(rng: random.Random, raw: bytes) -> bytes:
    fields = fields_of(raw)
    fields.insert(rng.randint(0, len(fields)), rng.choice(STRANGE_FIELDS))
    return b"".join(fields)


def with_another_byte(rng: random.Random, raw: bytes) -> bytes:
    at = rng.randint(0, len(raw))
    return raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]


def with_more_bytes(rng: random.Random, raw: bytes) -> bytes:
    at = rng.randint(0, len(raw))
    return raw[:at] + rng.randbytes(rng.randint(1, 4)) + raw[at:]


# To a message that protobuf allows as well, or nearly one.
CHANGES = (
    shuffled,
    with_a_strange_field,
    with_another_byte,
    with_more_bytes,
    lambda rng, raw: raw[: rng.randint(0, len(raw))],
    lambda rng, raw: raw + rng.choice(STRANGE_FIELDS),
)


def test_it_reads_what_protobuf_reads(pytestconfig):
    rng = random.Random(0)
    for _ in range(pytestconfig.getoption("--wire-cases")):
        kind, message = a_message(rng)
        raw = message.SerializeToString()
        for _ in range(rng.randrange(3)):
            try:
                raw = rng.choice(CHANGES)(rng, raw)
            except IndexError:  # `fields_of` wants a message that is well-formed
                break
        check(kind, raw)


@pytest.mark.parametrize("field", STRANGE_FIELDS)
def test_strange_fields_before_and_behind_the_payload(field):
    raw = pb.EncodeRequest(codebook="a", dtype=1, shape=[2], latents=b"12345678").SerializeToString()
    for kind in KINDS:
        check(kind, raw + field)
        check(kind, field + raw)


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16383, 16384, 1 << 21])
@pytest.mark.parametrize("kind", KINDS)
def test_it_writes_what_protobuf_writes(kind, size):
    payload = bytes(size)
    head = kind(dtype=3, shape=[1, size])
    raw = head.SerializeToString() + wire.payload_tag(size) + payload
    assert kind.FromString(raw) == kind(dtype=3, shape=[1, size], **{KINDS[kind]: payload})
    message, data = wire.read(kind, raw)
    assert message == head
    assert data == payload
    assert wire.payload_span(raw) == (len(raw) - size - len(wire.payload_tag(size)), len(raw) - size)


def unknown(nbytes: int) -> bytes:
    """So many bytes of small fields that no message of ours has."""
    more = nbytes % 3
    return b"\x98\x01\x07" * (nbytes // 3 - 1) + b"\x9a\x01" + bytes([more]) + bytes(more)


def unknown_field(nbytes: int) -> bytes:
    """The same as one field."""
    head = b"\x9a\x01" + wire.varint(nbytes)
    return head + bytes(nbytes - len(head))


PAYLOAD = b"\xa2\x06\x04abcd"
# What is around so many bytes of other fields, and how much of it counts with them. A payload counts if it is not found
# among the first fields.
FORMS = {
    "before the payload": (lambda filler: filler + PAYLOAD, 7),
    "behind it": (lambda filler: PAYLOAD + filler, 3),
    "between two": (lambda filler: PAYLOAD + filler + PAYLOAD, 10),
    "without one": (lambda filler: filler, 0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_beside_the_payload_is_bounded(kind, form):
    around, counted = FORMS[form]
    largest = wire.MOST_HEAD_BYTES - counted
    check(kind, around(unknown(largest)))
    for filler in (unknown(largest + 1), unknown(60 << 20), unknown_field(60 << 20)):
        with pytest.raises(wire.HeadTooLarge, match="65536 bytes beside its payload"):
            wire.read(kind, around(filler))


@pytest.mark.parametrize(("before", "behind"), [(b"", b""), (STRANGE_FIELDS[0], b""), (b"", STRANGE_FIELDS[3])])
def test_a_payload_may_be_larger(before, behind):
    raw = pb.EncodeRequest(codebook="a", dtype=1, shape=[1 << 20], latents=bytes(1 << 20)).SerializeToString()
    check(pb.EncodeRequest, before + raw + behind)


def test_a_large_message_that_is_cut_off_is_no_message():
    raw = pb.EncodeRequest(codebook="a", latents=bytes(1 << 20)).SerializeToString()[:-1]
    with pytest.raises(DecodeError) as caught:
        wire.read(pb.EncodeRequest, raw)
    assert caught.type is DecodeError


def test_a_payload_is_a_view_of_its_message():
    raw = pb.DecodeResponse(dtype=1, shape=[4], latents=b"0123456789abcdef").SerializeToString()
    assert wire.read(pb.DecodeResponse, raw)[1].obj is raw


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 1 << 32, (1 << 63) - 1])
def test_varints_are_protobufs(value):
    assert pb.ServedStats(queue_us=value).SerializeToString() == (b"\x08" + wire.varint(value) if value else b"")


@pytest.mark.parametrize("name_length", range(12))
@pytest.mark.parametrize("size", [0, 1, 300, 20000])
def test_a_reply_is_a_message_written_in_place(name_length, size):
    head = pb.EncodeResponse(digest="d" * name_length, dtype=5, shape=[size])
    template = wire.ReplyTemplate(head.SerializeToString(), 4, 5, size)
    assert template.start % 8 == 0
    for counters in ((0, 0, 0, 0, 0), (1, 127, 128, 1 << 20, (1 << 35) - 1), (1 << 40, 1 << 60, 5, 1 << 31, 7)):
        buffer = wire.ReplyBuffer(template)
        payload = np.frombuffer(memoryview(buffer.memory), np.uint8, offset=template.start)
        payload[:] = np.arange(size, dtype=np.uint32) % 251
        raw = buffer.write_header(counters)
        message = pb.EncodeResponse.FromString(raw)
        capped = [min(value, (1 << 35) - 1) for value in counters]
        stats = message.stats
        assert [stats.queue_us, stats.compute_us, stats.total_us, stats.batch_rows] == [*capped[:3], capped[4]]
        assert stats.batch_requests == capped[3] & 0xFFFFFFFF
        assert message.indices == payload.tobytes()
        assert (message.digest, list(message.shape)) == (head.digest, [size])
        check(pb.EncodeResponse, raw)
        assert bytes(wire.read(pb.EncodeResponse, raw)[1]) == message.indices


def test_replies_of_a_template_share_no_memory():
    template = wire.ReplyTemplate(b"", 4, 5, 8)
    one, two = wire.ReplyBuffer(template), wire.ReplyBuffer(template)
    one.memory[template.start :] = b"11111111"
    two.memory[template.start :] = b"22222222"
    first, second = one.write_header([0] * 5), two.write_header([1] * 5)
    assert first.endswith(b"11111111")
    assert second.endswith(b"22222222")
    assert hash(first) != hash(second)


def test_an_array_in_a_reply_keeps_its_memory():
    template = wire.ReplyTemplate(b"", 4, 5, 1 << 20)
    # Nobody but the array has them: were they freed, the next ones would get the same memory.
    arrays = [np.frombuffer(memoryview(wire.ReplyBuffer(template).memory), np.uint8) for _ in range(50)]
    for number, array in enumerate(arrays):
        array[:] = number
    assert all((array == number).all() for number, array in enumerate(arrays))
