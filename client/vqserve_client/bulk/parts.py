"""What becomes of the results of a job: pieces become arrays, arrays shards, and shards with their records parts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from vqserve.errors import COMMAND_LINE, VqserveError
from vqserve.layout import Layout
from vqserve_client.arrays import Array, Plan
from vqserve_client.bulk.handoff import Stopped
from vqserve_client.bulk.progress import Counts
from vqserve_client.bulk.records import Part, Position, Records, line_of
from vqserve_client.conversion import Conversion, Outline, Piece
from vqserve_data.errors import FileError
from vqserve_data.writers.protocol import Shard, Writer, Written

# Items of a part, whose records are in memory; of formats with a file for each item fewer, as all their files wait.
_SHARD_ITEMS = 100_000
_MIRRORED_ITEMS = 1000
# Digits of an item's hash: 128 bits.
_HASH_DIGITS = 32


class TooManyErrors(FileError):
    """More items than are allowed have no result."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a job.

    Attributes:
        shard_items: items of a shard at most; None: 100,000, or of a format with a file for each item 1000.
        shard_bytes: a shard ends when its arrays have this many bytes.
        errors: items without a result at most; None: any number.
    """

    shard_items: int | None = None
    shard_bytes: int = 128 << 20
    errors: int | None = 100


# The outline of an item that could not be read.
_NOTHING = Outline((), 0, Plan((), 0, 0), Layout.CHANNELS_LAST)


@dataclass(eq=False, slots=True)
class Work:
    """One item on its way.

    Attributes:
        end: place in the sources behind it.
        outline: what becomes of its array.
        left: pieces without a result.
        array: place of its result; None: not yet begun.
        reason: why it has no result.
    """

    end: Position
    key: str
    source: str
    shape: tuple[int, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    outline: Outline = _NOTHING
    left: int = 0
    array: Array | None = None
    reason: str | None = None

    @property
    def fields_bytes(self) -> int:
        """About how much memory the fields take, such as a picture beside small latents."""
        return sum(_size_of(value) for value in self.fields.values())


class Sent(NamedTuple):
    """A piece of an item: with its array on the way to the server, with the result or the error on the way back."""

    work: Work
    piece: Piece | None
    value: Any


class Output:
    """The output of one run, written by one thread.

    Attributes:
        open_errors: records of the items without a result that are in no part yet.
    """

    def __init__(
        self,
        conversion: Conversion,
        *,
        writer: Writer,
        metadata: dict[str, str],
        records: Records,
        limits: Limits,
        counts: Counts,
    ) -> None:
        """Begin nothing yet.

        Args:
            conversion: what is done to each array.
            writer: format of the output.
            metadata: texts for the shards.
            records: records of the output, opened and checked.
            limits: limits of shards and errors.
            counts: what is shown meanwhile.
        """
        self._conversion = conversion
        self._writer = writer
        self._metadata = metadata
        self._records = records
        self._limits = limits
        self._counts = counts
        self._shard: Shard | None = None
        self._lines: list[str] = []
        self.open_errors: list[dict[str, Any]] = []
        self._end = records.end
        self._items = self._tokens = 0
        self._bad = sum(part.bad for part in records.parts)
        self._stopped = False

    def stop(self) -> None:
        """Begin no more parts."""
        self._stopped = True

    def take(self, sent: Sent) -> None:
        """Take the result of a piece, or an item without a result."""
        work, piece, value = sent
        if self._stopped:
            raise Stopped
        if piece is None:
            work.reason = work.reason or value
            work.left = 0
        elif work.reason is None:
            self._fill(work, piece, value)
        else:
            work.left -= 1
        if work.left == 0:
            self._finish(work)

    def _fill(self, work: Work, piece: Piece, value: Any) -> None:
        work.left -= 1
        if isinstance(value, VqserveError):
            work.reason = one_line(self._conversion.of_whole(value, piece))
            work.array = None
            return
        if work.array is None:
            work.array = self._open_shard().place(work.key, work.outline.shape, self._conversion.dtype)
        work.array[piece.target] = value
        self._counts.tokens += work.outline.tokens_in(value)
        self._counts.written_bytes += value.nbytes

    def _finish(self, work: Work) -> None:
        line: dict[str, Any] = {"key": work.key, "source": work.source}
        if work.reason is None and work.array is not None:
            shard = self._open_shard()
            shard.add(work.key, work.array, work.fields)
            line |= {"shape": list(work.shape), "result": list(work.outline.shape), "hash": _hash(work.array)}
            self._items += 1
            self._tokens += work.outline.tokens
            self._counts.items += 1
        else:
            line["reason"] = work.reason
            self.open_errors.append(line)
            self._bad += 1
            self._counts.bad += 1
        self._lines.append(line_of(line))
        self._end = work.end
        work.array = None
        if self._shard is not None and self._is_full(self._shard):
            self._close_part()
        if self._limits.errors is not None and self._bad > self._limits.errors:
            raise TooManyErrors(
                f"{self._bad} items have no result, and --max-errors is {self._limits.errors}. The last: {work.key}: "
                f"{work.reason}"
            )

    def _is_full(self, shard: Shard) -> bool:
        most = self._limits.shard_items or (_MIRRORED_ITEMS if self._writer.names(0) is None else _SHARD_ITEMS)
        return shard.nbytes >= self._limits.shard_bytes or self._items >= most

    def end(self) -> None:
        """Write the last part."""
        if self._lines:
            self._close_part()

    def abandon(self) -> None:
        """Remove the files of the part that is not whole."""
        if self._shard is not None:
            self._shard.abandon()

    def _open_shard(self) -> Shard:
        if self._shard is None:
            self._shard = self._writer.shard(self._records.folder, len(self._records.parts), self._metadata)
        return self._shard

    def _close_part(self) -> None:
        files: list[Written] = [] if self._shard is None else self._shard.close()
        bad = len(self._lines) - self._items
        self._records.add(Part(tuple(files), self._end, self._items, bad, self._tokens), self._lines)
        self._shard, self._lines, self._items, self._tokens = None, [], 0, 0
        self.open_errors = []
        self._counts.parts += 1


def _size_of(value: Any) -> int:
    match value:
        case bytes() | str():
            return len(value)
        case np.ndarray():
            return value.nbytes
        case dict():
            return sum(map(_size_of, value.values()))
        case list() | tuple():
            return sum(map(_size_of, value))
        case _:
            return 0


def _hash(array: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()[:_HASH_DIGITS]


def one_line(error: Exception) -> str:
    """Return what is said of an error in the records, in words of the command line."""
    text = error.statement(COMMAND_LINE) if isinstance(error, VqserveError) else str(error)
    return " ".join(text.split())
