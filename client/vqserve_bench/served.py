"""The statistics of a server in its replies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from google.protobuf.message import DecodeError

from vqserve import wire
from vqserve.v1 import tokenizer_pb2 as pb

# Up to this size protobuf copies a payload faster than this code finds its beginning.
_COPIED_BYTES = 64 << 10


class Stats(Protocol):
    """The statistics of one request; vqserve.v1.ServedStats documents the fields."""

    @property
    def queue_us(self) -> int: ...  # noqa: D102
    @property
    def compute_us(self) -> int: ...  # noqa: D102
    @property
    def total_us(self) -> int: ...  # noqa: D102
    @property
    def batch_requests(self) -> int: ...  # noqa: D102
    @property
    def batch_rows(self) -> int: ...  # noqa: D102


# Reads a reply; returns None if it has no statistics. Must be a function of a module, because it is pickled.
ReadStats = Callable[[bytes], Stats | None]


@dataclass
class Served:
    """Sums over replies, times in microseconds.

    A reply has the number of requests in its batch. Each request counts as its part of a batch, so that `batches` is
    the number of batches.
    """

    replies: int = 0
    queue_us: int = 0
    compute_us: int = 0
    total_us: int = 0
    batches: float = 0.0
    rows: float = 0.0

    def add(self, stats: Stats) -> None:
        """Add the statistics of one reply."""
        self.replies += 1
        self.queue_us += stats.queue_us
        self.compute_us += stats.compute_us
        self.total_us += stats.total_us
        part = 1 / max(stats.batch_requests, 1)
        self.batches += part
        self.rows += stats.batch_rows * part


def encode_stats(reply: bytes) -> Stats | None:
    """Read the reply to an Encode."""
    return _stats(pb.EncodeResponse, reply)


def decode_stats(reply: bytes) -> Stats | None:
    """Read the reply to a Decode."""
    return _stats(pb.DecodeResponse, reply)


def _stats(kind: type[pb.EncodeResponse] | type[pb.DecodeResponse], reply: bytes) -> Stats | None:
    try:
        message = kind.FromString(reply) if len(reply) <= _COPIED_BYTES else wire.read(kind, reply)[0]
    except DecodeError:
        return None
    return message.stats if message.HasField("stats") else None
