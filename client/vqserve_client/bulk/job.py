"""A data set to tokens, or tokens to latents: read, sent and written at once, in the order of the sources.

Three threads hand items on. One reads the sources and cuts large arrays into pieces. The caller's sends them by
`encode_many` or `decode_many`, which keeps many requests in flight and gives the results in order. One puts the results
together and writes the shards. So what is written depends on the sources alone: not on the servers, the order of their
answers, or how often the job was stopped.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np

from vqserve.errors import InvalidArgument, VqserveError
from vqserve_client.arrays import Array
from vqserve_client.bulk.handoff import Handoff, Stopped
from vqserve_client.bulk.mapping import Mapping
from vqserve_client.bulk.parts import Output, Sent, Work, one_line
from vqserve_client.bulk.progress import Counts
from vqserve_client.bulk.records import Position
from vqserve_client.client import Client
from vqserve_client.conversion import Conversion
from vqserve_data.errors import FileError
from vqserve_data.items import BadItem, Item, Record
from vqserve_data.readers.protocol import SourceFile

# Bytes that are read ahead, and bytes of results that wait to be written.
_AHEAD_BYTES = 64 << 20
# Small pieces change threads together, up to these limits.
_CHUNK_BYTES = 1 << 20
_CHUNK_PIECES = 64
# What a piece costs in a chunk beside its array.
_PIECE_OVERHEAD = 512
# How long the threads are waited for after an error; the one that writes removes what is not whole. After Ctrl-C the
# one that reads is not waited for so long: it may wait for a source or for the user's function, and leaves nothing.
_STOP_S = 5.0
_INTERRUPT_S = 0.25

# Reads the items of a file, from the one with this number on.
Read = Callable[[SourceFile, int], Iterator[Record]]


class Job:
    """One run, from the end of the last whole part to the end of the sources."""

    def __init__(
        self,
        client: Client,
        conversion: Conversion,
        *,
        files: Sequence[SourceFile],
        start: Position,
        read: Read,
        function: Mapping | None,
        output: Output,
        counts: Counts,
    ) -> None:
        """Do nothing yet.

        Args:
            client: the client, whose servers have the codebook of the conversion.
            conversion: what is done to each array.
            files: the sources.
            start: place in them where the job begins.
            read: what reads them.
            function: makes the arrays of what is read; None: they are read.
            output: takes the results.
            counts: what is shown meanwhile.
        """
        self._client = client
        self._conversion = conversion
        self._files = files
        self._read = read
        self._map = function
        self._start = start
        self._output = output
        self._counts = counts
        self._incoming: Handoff[list[Sent]] = Handoff(_AHEAD_BYTES)
        self._outgoing: Handoff[list[Sent]] = Handoff(_AHEAD_BYTES)
        # Pieces that were sent, and between them items without a piece, in order.
        self._pending: deque[Sent] = deque()
        self._results = _Chunk(self._outgoing)

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
            interrupted = isinstance(sys.exception(), KeyboardInterrupt | SystemExit)
            for thread, seconds in zip(threads, (_INTERRUPT_S if interrupted else _STOP_S, _STOP_S), strict=True):
                thread.join(seconds)
            self._counts.waited_for_sources_s = self._incoming.waited_to_take_s
            self._counts.waited_for_output_s = self._outgoing.waited_to_put_s

    def _send_all(self) -> None:
        for result in self._conversion.many(self._client, self._arrays(), on_error="return"):
            sent = self._pending.popleft()
            if isinstance(result, VqserveError) and not isinstance(result, InvalidArgument):
                # The servers are at fault, not this array: the job must go on here the next time.
                raise result
            self._results.add(sent._replace(value=result), getattr(result, "nbytes", 0))
            self._pass_without_piece()
        self._results.flush()

    def _pass_without_piece(self) -> None:
        while self._pending and self._pending[0].piece is None:
            self._results.add(self._pending.popleft(), 0)

    def _arrays(self) -> Iterator[Array]:
        for chunk in self._incoming:
            for sent in chunk:
                self._pending.append(sent._replace(value=None))
                if sent.piece is not None:
                    yield sent.value
                else:
                    # Where every item is bad, no result would ever come.
                    self._pass_without_piece()

    def _read_all(self) -> None:
        try:
            chunk = _Chunk(self._incoming)
            for work, array in self._works():
                if array is None:
                    chunk.add(Sent(work, None, None), 0)
                    continue
                try:
                    for piece in self._conversion.pieces(work.outline):
                        part = np.asarray(array[piece.source])
                        chunk.add(Sent(work, piece, part), part.nbytes)
                except FileError as error:
                    # The pieces before it are on their way; this one tells that the item has no result.
                    chunk.add(Sent(work, None, one_line(error)), 0)
            chunk.flush()
            self._incoming.end()
        except BaseException as error:
            self._incoming.end(error)

    def _works(self) -> Iterator[tuple[Work, Any]]:
        placed = self._placed()
        # Without a map no reader gives raw items.
        items = cast("Iterator[tuple[Position, Item | BadItem]]", placed) if self._map is None else self._map(placed)
        for end, item in items:
            self._counts.read_items += 1
            yield self._work(item, end)

    def _placed(self) -> Iterator[tuple[Position, Record]]:
        """Yield all that is left in the sources, with the place behind it."""
        start = self._start
        for number in range(start.file, len(self._files)):
            file = self._files[number]
            first = start.items if number == start.file else 0
            for count, item in enumerate(self._read(file, first), first + 1):
                yield Position(number, count), item
            if file.changed():
                raise FileError(
                    f"{file.name} was changed or removed while the job was running: begin anew with --force"
                )
            self._counts.read_bytes += file.size

    def _work(self, item: Item | BadItem, end: Position) -> tuple[Work, Any]:
        if isinstance(item, BadItem):
            return Work(end, item.key, item.source, reason=item.reason), None
        work = Work(end, item.key, item.source, tuple(item.array.shape), item.fields)
        try:
            work.outline = self._conversion.outline(work.shape, item.array.dtype)
        except InvalidArgument as error:
            work.reason = one_line(error)
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

    def __init__(self, handoff: Handoff[list[Sent]]) -> None:
        self._handoff = handoff
        self._pieces: list[Sent] = []
        self._bytes = 0

    def add(self, sent: Sent, nbytes: int) -> None:
        self._pieces.append(sent)
        self._bytes += nbytes + sent.work.fields_bytes + _PIECE_OVERHEAD
        if self._bytes >= _CHUNK_BYTES or len(self._pieces) >= _CHUNK_PIECES:
            self.flush()

    def flush(self) -> None:
        if self._pieces:
            pieces, nbytes = self._pieces, self._bytes
            self._pieces, self._bytes = [], 0
            self._handoff.put(pieces, nbytes)
