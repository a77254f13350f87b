"""What a stranger's message costs before it is admitted."""

from __future__ import annotations

import gzip
import time
from collections.abc import Iterator

from reliability import health, loads, raw_http2
from reliability.figure import Figure
from reliability.messages import CHANNELS, CHEAP, MIB, rows_of
from reliability.registry import scenario
from reliability.server import within
from reliability.setup import Setup
from vqserve.v1 import tokenizer_pb2 as pb

# Field 15, a varint of one byte: unknown, and of the smallest size.
_FIELDS_BYTES, _FIELDS_MESSAGES = 2 * MIB, 20
_LARGE_BYTES, _LARGE_MESSAGES = 60 * MIB, 60
_MOST_CPU_S = 0.1
_LONGEST_S = 30.0
_QUEUE_MIB = 256
# What the server has anyway, and its queue three times.
_MOST_MIB = 512 + 3 * _QUEUE_MIB


@scenario("unknown-fields", "messages of unknown fields, and messages that inflate, are cheap to refuse", seconds=5)
def unknown_fields(setup: Setup) -> Iterator[Figure]:
    fields = b"\x78\x01" * (_FIELDS_BYTES // 2)
    for case, compressed in (("gzip", True), ("plain", False)):
        if setup.wants(name := f"fields, {case}"):
            yield from _fields(setup, name, fields, compressed=compressed)
    for case, compressed in (("gzip", True), ("plain", False)):
        if setup.wants(name := f"60 x 60 MiB, {case}"):
            yield from _large(setup, name, compressed=compressed)


def _fields(setup: Setup, case: str, message: bytes, *, compressed: bool) -> Iterator[Figure]:
    server = setup.server()
    checks = setup.beside(health.probe, server.target)
    before = server.cpu_s()
    body = _message(message, compressed=compressed)
    count = _FIELDS_MESSAGES
    sending = setup.beside(raw_http2.send, server.target, body, count)
    began = time.monotonic()
    sending.wait(_LONGEST_S)
    lasted = time.monotonic() - began
    seen = sending.result()
    # The health checks cost a little CPU themselves: as much as in the same time without messages.
    sent = server.cpu_s() - before
    before = server.cpu_s()
    for _ in within(lasted):
        pass
    spent = max(0.0, sent - (server.cpu_s() - before))
    yield from health.figures(checks.result(), case)
    yield Figure(what=f"{case}: CPU of the server, s", value=spent, at_most=_MOST_CPU_S if compressed else None)
    yield Figure(what=f"{case}: what came of them", value=loads.text(seen))
    server.kill()


def _large(setup: Setup, case: str, *, compressed: bool) -> Iterator[Figure]:
    server = setup.server("--max-queue-bytes", _QUEUE_MIB * MIB)
    message = pb.EncodeRequest(codebook=CHEAP, dtype=pb.DTYPE_FLOAT32, shape=(rows_of(_LARGE_BYTES), CHANNELS))
    message.latents = bytes(_LARGE_BYTES)
    body = _message(message.SerializeToString(), compressed=compressed)
    checks = setup.beside(health.probe, server.target)
    count = _LARGE_MESSAGES
    sending = setup.beside(raw_http2.send, server.target, body, count)
    sending.wait(_LONGEST_S)
    yield from health.figures(checks.result(), case)
    seen = sending.result()
    yield Figure(what=f"{case}: peak memory of the server, MiB", value=server.peak_mib(), at_most=_MOST_MIB)
    yield Figure(what=f"{case}: what came of them", value=loads.text(seen))
    server.kill()


def _message(message: bytes, *, compressed: bool) -> bytes:
    return gzip.compress(message) if compressed else message
