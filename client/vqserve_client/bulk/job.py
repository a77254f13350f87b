"""A data set to tokens, or tokens to latents: read, sent and written at once, in the order of the sources.

Three threads hand items on. One reads the sources and cuts large arrays into pieces. The caller's sends them by
`encode_many` or `decode_many`, which keeps many requests in flight and gives the results in order. One puts the results
together and writes the shards. So what is written depends on the sources alone: not on the servers, the order of their
answers, or how often the job was stopped.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from vqserve.errors import COMMAND_LINE, InvalidArgument, VqserveError
from vqserve.layout import Layout
from vqserve_client.arrays import Array, Plan
from vqserve_client.bulk.handoff import Handoff, Stopped
from vqserve_client.bulk.progress import Counts
from vqserve_client.bulk.records import Part, Position, Records, line_of
from vqserve_client.client import Client
from vqserve_client.conversion import Conversion, Outline, Piece
from vqserve_data.errors import FileError
from vqserve_data.items import BadItem, Item
from vqserve_data.readers.protocol import SourceFile
from vqserve_data.writers.protocol import Shard, Writer, Written

# Bytes that are read ahead, and bytes of results that wait to be written.
_AHEAD_BYTES = 64 << 20
# Small pieces change threads together, up to these limits.
_CHUNK_BYTES = 1 << 20
_CHUNK_PIECES = 64
# What a piece costs in a chunk beside its array.
_PIECE_OVERHEAD = 512
# How long the threads are waited for after an error or Ctrl-C.
_STOP_S = 5.0
# Items of a part, whose records are in memory; of formats with a file for each item fewer, as all their files wait.
_SHARD_ITEMS = 100_000
_MIRRORED_ITEMS = 1000
# Digits of an item's hash: 128 bits.
_HASH_DIGITS = 32

# Reads the items of a file, from the one with this number on.
Read = Callable[[SourceFile, int], Iterator[Item | BadItem]]


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
class _Work:
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


class _Sent(NamedTuple):
    """A piece of an item: with its array on the way to the server, with the result or the error on the way back."""

    work: _Work
    piece: Piece | None
    value: Any


class Job:
    """One run, from the end of the last whole part to the end of the sources."""

    def __init__(
        self,
        client: Client,
        conversion: Conversion,
        *,
        files: Sequence[SourceFile],
        read: Read,
        writer: Writer,
        metadata: Mapping[str, str],
        records: Records,
        limits: Limits,
        counts: Counts,
    ) -> None:
        """Do nothing yet.

        Args:
            client: the client, whose servers have the codebook of the conversion.
            conversion: what is done to each array.
            files: the sources.
            read: what reads them.
            writer: format of the output.
            metadata: texts for the shards.
            records: records of the output, opened and checked.
            limits: limits of shards and errors.
            counts: what is shown meanwhile.
        """
        self._client = client
        self._conversion = conversion
        self._files = files
        self._read = read
        self._records = records
        self._counts = counts
        self._incoming: Handoff[list[_Sent]] = Handoff(_AHEAD_BYTES)
        self._outgoing: Handoff[list[_Sent]] = Handoff(_AHEAD_BYTES)
        self._output = _Output(
            conversion, writer=writer, metadata=metadata, records=records, limits=limits, counts=counts
        )
        # Pieces that were sent, and between them items without a piece, in order.
        self._pending: deque[_Sent] = deque()

    def run(self) -> None:
        """Convert all that is left; what was written stays, however this ends.

        Raises:
            FileError: a source was changed, the disk is full, or there are too many errors.
            VqserveError: the servers cannot go on.
        """
        threads = [
            threading.Thread(target=self._read_all, name="vqserve-reading", daemon=True),
            threading.Thread(target=self._write_all, name="vqserve-writing", daemon=True),
        ]
        for thread in threads:
            thread.start()
        try:
            self._send_all()
            self._outgoing.end()
            threads[1].join()
            self._outgoing.check()
        finally:
            self._incoming.refuse()
            self._outgoing.end(Stopped())
            self._output.stop()
            for thread in threads:
                thread.join(_STOP_S)
            self._counts.waited_for_sources_s = self._incoming.waited_to_take_s
            self._counts.waited_for_output_s = self._outgoing.waited_to_put_s

    @property
    def open_errors(self) -> list[dict[str, Any]]:
        """Records of the items without a result that are in no part yet."""
        return self._output.open_errors

    def _send_all(self) -> None:
        chunk = _Chunk(self._outgoing)
        for result in self._conversion.many(self._client, self._arrays(), on_error="return"):
            self._pass_without_piece(chunk)
            sent = self._pending.popleft()
            if isinstance(result, VqserveError) and not isinstance(result, InvalidArgument):
                # The servers are at fault, not this array: the job must go on here the next time.
                raise result
            chunk.add(sent._replace(value=result), getattr(result, "nbytes", 0))
        self._pass_without_piece(chunk)
        chunk.flush()

    def _pass_without_piece(self, chunk: _Chunk) -> None:
        while self._pending and self._pending[0].piece is None:
            chunk.add(self._pending.popleft(), 0)

    def _arrays(self) -> Iterator[Array]:
        for chunk in self._incoming:
            for sent in chunk:
                self._pending.append(sent._replace(value=None))
                if sent.piece is not None:
                    yield sent.value

    def _read_all(self) -> None:
        try:
            chunk = _Chunk(self._incoming)
            for work, array in self._works():
                if array is None:
                    chunk.add(_Sent(work, None, None), 0)
                    continue
                try:
                    for piece in self._conversion.pieces(work.outline):
                        part = np.asarray(array[piece.source])
                        chunk.add(_Sent(work, piece, part), part.nbytes)
                except FileError as error:
                    # The pieces before it are on their way; this one tells that the item has no result.
                    chunk.add(_Sent(work, None, _one_line(error)), 0)
            chunk.flush()
            self._incoming.end()
        except BaseException as error:
            self._incoming.end(error)

    def _works(self) -> Iterator[tuple[_Work, Any]]:
        start = self._records.end
        for number in range(start.file, len(self._files)):
            file = self._files[number]
            first = start.items if number == start.file else 0
            for count, item in enumerate(self._read(file, first), first + 1):
                self._counts.read_items += 1
                yield self._work(item, Position(number, count))
            if file.changed():
                raise FileError(
                    f"{file.name} was changed or removed while the job was running: begin anew with --force"
                )
            self._counts.read_bytes += file.size

    def _work(self, item: Item | BadItem, end: Position) -> tuple[_Work, Any]:
        if isinstance(item, BadItem):
            return _Work(end, item.key, item.source, reason=item.reason), None
        work = _Work(end, item.key, item.source, tuple(item.array.shape), item.fields)
        try:
            work.outline = self._conversion.outline(work.shape, item.array.dtype)
        except InvalidArgument as error:
            work.reason = _one_line(error)
            return work, None
        work.left = len(work.outline.cuts)
        return work, item.array

    def _write_all(self) -> None:
        try:
            for chunk in self._outgoing:
                for sent in chunk:
                    self._output.take(sent)
            self._output.end()
        except Stopped:
            self._output.abandon()
        except BaseException as error:
            self._output.abandon()
            self._outgoing.refuse(error)


class _Chunk:
    """Pieces that change threads together."""

    def __init__(self, handoff: Handoff[list[_Sent]]) -> None:
        self._handoff = handoff
        self._pieces: list[_Sent] = []
        self._bytes = 0

    def add(self, sent: _Sent, nbytes: int) -> None:
        self._pieces.append(sent)
        self._bytes += nbytes + _PIECE_OVERHEAD
        if self._bytes >= _CHUNK_BYTES or len(self._pieces) >= _CHUNK_PIECES:
            self.flush()

    def flush(self) -> None:
        if self._pieces:
            pieces, nbytes = self._pieces, self._bytes
            self._pieces, self._bytes = [], 0
            self._handoff.put(pieces, nbytes)


class _Output:
    """Results become arrays, arrays shards, and shards with their records parts."""

    def __init__(
        self,
        conversion: Conversion,
        *,
        writer: Writer,
        metadata: Mapping[str, str],
        records: Records,
        limits: Limits,
        counts: Counts,
    ) -> None:
        self._conversion = conversion
        self._writer = writer
        self._metadata = metadata
        self._records = records
        self._limits = limits
        self._counts = counts
        self._shard: Shard | None = None
        self._lines: list[str] = []
        # Records of the items without a result that are in no part yet.
        self.open_errors: list[dict[str, Any]] = []
        self._end = records.end
        self._items = self._tokens = 0
        self._bad = sum(part.bad for part in records.parts)
        self._stopped = False

    def stop(self) -> None:
        """Begin no more parts."""
        self._stopped = True

    def take(self, sent: _Sent) -> None:
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

    def _fill(self, work: _Work, piece: Piece, value: Any) -> None:
        work.left -= 1
        if isinstance(value, VqserveError):
            work.reason = _one_line(self._conversion.of_whole(value, piece))
            work.array = None
            return
        if work.array is None:
            work.array = self._open_shard().place(work.key, work.outline.shape, self._conversion.dtype)
        work.array[piece.target] = value
        self._counts.tokens += work.outline.tokens_in(value)
        self._counts.written_bytes += value.nbytes

    def _finish(self, work: _Work) -> None:
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


def _hash(array: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()[:_HASH_DIGITS]


def _one_line(error: Exception) -> str:
    text = error.statement(COMMAND_LINE) if isinstance(error, VqserveError) else str(error)
    return " ".join(text.split())
