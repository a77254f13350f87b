"""One validated request on its way through the engine."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vqserve.dtypes import LATENTS_BY_STORAGE
from vqserve.errors import Cancelled, DeadlineExceeded, InvalidArgument
from vqserve.layout import Layout, channel_axis, grid_shape
from vqserve.types import OutputName
from vqserve.validation import beyond_dtype, check_indices
from vqserve_server.config import EngineConfig
from vqserve_server.engine.caller import Caller
from vqserve_server.engine.copy import first_overflow, read_rows, read_tokens, write_rows, write_tokens
from vqserve_server.event_log import event
from vqserve_server.metrics.recorder import OperationMetrics
from vqserve_server.search.native import NativeBatch, Span
from vqserve_server.validation import check_finite

if TYPE_CHECKING:
    from vqserve_server.engine.queue import Line
    from vqserve_server.tokenizer import Tokenizer

Array = npt.NDArray[Any]

_INDEX_DTYPE, _WIDE = np.dtype(np.int64), np.dtype(np.float64)
# A batch to decode may have this many times the rows of one to encode: a lookup costs less than a search.
_DECODED_PER_ENCODED = 4
# Guards the outcomes of all jobs; it is held for a few operations only.
_outcomes = threading.Lock()

logger = logging.getLogger(__name__)


class EncodeKey(NamedTuple):
    """The key of encode batches: rows with equal keys may share a batch.

    Attributes:
        tokenizer: the codebook.
        rows_dtype: float32 or float64, the type of the rows after widening.
        num_quantizers: indices of a token, as an axis; None: one index, without an axis.
    """

    tokenizer: Tokenizer
    rows_dtype: np.dtype[Any]
    num_quantizers: int | None = None

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row that `compute` takes."""
        return (self.tokenizer.info.input_dim,)

    def max_rows(self, config: EngineConfig) -> int:
        """Return how many rows a batch may have."""
        row_bytes = self.tokenizer.info.input_dim * self.rows_dtype.itemsize + 8 * (self.num_quantizers or 1)
        return max(1, min(config.max_batch_rows, config.max_batch_bytes // row_bytes))

    def compute(self, rows: Array) -> Array:
        """Return the indices of rows (n, C): (n,) or (n, num_quantizers)."""
        return self.tokenizer.encode_rows(rows, num_quantizers=self.num_quantizers)

    def compute_in_place(self, native: NativeBatch, spans: list[Span]) -> bool | None:
        """Write the indices of tokens; see `NativeBatch.encode`."""
        return native.encode(spans, is_wide=self.rows_dtype == _WIDE)


class DecodeKey(NamedTuple):
    """The key of decode batches: indices with equal keys may share a batch.

    Attributes:
        tokenizer: the codebook.
        output: latents, or rows of the codebook.
        dtype: of the reply: a type's `storage` (vqserve.dtypes).
        num_quantizers: indices of a token that are used, as an axis; None: one index, without an axis.
    """

    tokenizer: Tokenizer
    output: OutputName
    dtype: np.dtype[Any]
    num_quantizers: int | None = None

    @property
    def rows_dtype(self) -> np.dtype[Any]:
        """Type of the indices that `compute` takes."""
        return _INDEX_DTYPE

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of the indices of one token."""
        return () if self.num_quantizers is None else (self.num_quantizers,)

    @property
    def channels(self) -> int:
        """Width of a row of the reply."""
        info = self.tokenizer.info
        return info.code_dim if self.output == "code_rows" else info.output_dim

    def max_rows(self, config: EngineConfig) -> int:
        """Return how many tokens a batch may have."""
        # The result is float64 at most.
        row_bytes = 8 * (self.num_quantizers or 1) + 8 * self.channels
        return max(1, min(config.max_batch_rows * _DECODED_PER_ENCODED, config.max_batch_bytes // row_bytes))

    def compute(self, indices: Array) -> Array:
        """Return the rows (n, channels) of indices, (n,) or (n, num_quantizers); see `Tokenizer.decode_rows`."""
        return self.tokenizer.decode_rows(indices, output=self.output, dtype=self.dtype)

    def compute_in_place(self, native: NativeBatch, spans: list[Span]) -> bool | None:
        """Write the rows of indices; see `NativeBatch.decode`."""
        return native.decode(spans, output=self.output, dtype=self.dtype)


# Equal keys are equal tuples; one for encode never equals one for decode, as their lengths differ.
Key = EncodeKey | DecodeKey


class RequestTiming(NamedTuple):
    """Times of a finished job, and the largest batch that contained it."""

    queue_us: int
    compute_us: int
    batch_requests: int
    batch_rows: int


class Job(ABC):
    """Rows in, rows out, and an outcome that is set exactly once.

    The scheduler's lock guards `next_row`, `cost` and `line`. Several threads may compute the parts of a job at once.

    Attributes:
        key: which jobs can share a batch with this one.
        caller: who sent the request.
        source: the array that is read.
        result: the array that is written; it owns its memory.
        layout: position of the channels in the latents, and of a token's indices.
        rows: tokens of the request.
        deadline: time.monotonic() seconds, or None.
        next_row: first row that is not part of a batch yet.
        cost: seconds that the rows from there on are expected to take.
        line: where the job waits, until all its rows are part of a batch.
        metrics: where its batches are counted; None: they are not.
        outcome: None until there is one; an exception if the job failed.
        is_valid: whether the values of the source are valid; None: nobody has looked.
    """

    metrics: OperationMetrics | None = None
    is_valid: bool | None = None

    def __init__(
        self,
        key: Key,
        caller: Caller,
        source: Array,
        result: Array,
        layout: Layout,
        *,
        rows: int,
        on_done: Callable[[], None],
        deadline: float | None = None,
    ) -> None:
        """Make the job; `on_done` is called once, on any thread, when the outcome is set (`cancel` apart)."""
        self.key = key
        self.caller = caller
        self.source = source
        self.result = result
        self.layout = layout
        self.rows = rows
        self.deadline = deadline
        self.outcome: RequestTiming | BaseException | None = None
        self.next_row = 0
        self.cost = 0.0
        self.line: Line | None = None
        self.arrived = time.monotonic()
        self._on_done = on_done
        self._waiting_since = self.arrived
        self._rows_done = 0
        self._queue_s = self._compute_s = 0.0
        self._batch_requests = self._batch_rows = 0

    def check(self) -> None:
        """Check the values of the source, unless they are known to be valid.

        Raises:
            InvalidArgument: names the first offender.
        """
        if not self.is_valid:
            self.is_valid = False
            self._check()
            self.is_valid = True

    @abstractmethod
    def _check(self) -> None:
        """Check the values of the source.

        Raises:
            InvalidArgument: names the first offender.
        """

    @abstractmethod
    def span(self, start: int, stop: int) -> Span:
        """Return where the rows [start, stop) are read and their results are written."""

    @abstractmethod
    def read(self, start: int, stop: int, into: Array) -> None:
        """Copy the rows [start, stop) into a batch."""

    @abstractmethod
    def write(self, start: int, results: Array) -> None:
        """Copy the results of the rows from `start` on into the reply.

        Raises:
            InvalidArgument: the reply cannot hold them; other jobs of the batch are not affected.
        """

    def in_whole(self, error: InvalidArgument, start: int) -> InvalidArgument:
        """Return an error about a row counted from `start` as one about the whole request."""
        return error

    def resolve(self, outcome: RequestTiming | BaseException) -> bool:
        """Set the outcome and call `on_done`, if there is no outcome yet; return whether there was none."""
        with _outcomes:
            if self.outcome is not None:
                return False
            self.outcome = outcome
        try:
            self._on_done()
        except Exception:
            # An error in sending the reply must not end a thread of the engine.
            logger.exception(event("reply_failed"))
        return True

    def cancel(self) -> None:
        """Set `Cancelled` as the outcome, unless the job has one; `on_done` is not called."""
        with _outcomes:
            if self.outcome is None:
                self.outcome = Cancelled("the caller has left")

    def expire(self, now: float) -> bool:
        """Resolve the job if its deadline has passed and it has no outcome; return whether that is so."""
        if self.deadline is None or self.deadline > now:
            return False
        return self.resolve(DeadlineExceeded("the deadline passed while the request was computed"))

    def finish_part(self, rows: int, *, started: float, ended: float, batch: tuple[int, int]) -> RequestTiming | None:
        """Count a part whose results are written; return the timing of the job if it was the last part.

        Args:
            rows: rows of the part.
            started: when the device began with the batch, in time.monotonic() seconds.
            ended: when it had finished.
            batch: requests and rows of the batch.
        """
        with _outcomes:
            self._rows_done += rows
            self._queue_s += max(started - self._waiting_since, 0.0)
            self._compute_s += ended - started
            self._waiting_since = ended
            if batch[1] > self._batch_rows:
                self._batch_requests, self._batch_rows = batch
            if self._rows_done < self.rows or self.outcome is not None:
                return None
        return RequestTiming(
            round(self._queue_s * 1e6), round(self._compute_s * 1e6), self._batch_requests, self._batch_rows
        )


class EncodeJob(Job):
    """Latents to indices.

    `source` holds latents of a type's `storage` (vqserve.dtypes). `result` holds
    indices in a type that fits the vocabulary: in the shape of the grid, or, if the key has a number of quantizers, in
    the shape of the latents with a token's indices in place of the channels.
    """

    def _check(self) -> None:
        check_finite(self.source)

    def span(self, start: int, stop: int) -> Span:
        """Return where the rows [start, stop) are read and their indices are written."""
        return Span(self.source, self.result, self.layout, start, stop)

    def sample(self, rows: list[int]) -> tuple[Array, Array]:
        """Return some rows and their indices, which were written: (n, C) as the key has them, (n,) int64."""
        latents = np.empty((len(rows), *self.key.row_shape), self.key.rows_dtype)
        for number, row in enumerate(rows):
            read_rows(self.source, self.layout, row, row + 1, latents[number : number + 1])
        return latents, self.result.reshape(-1)[rows].astype(np.int64)

    def read(self, start: int, stop: int, into: Array) -> None:
        """Copy the rows [start, stop) into a batch."""
        read_rows(self.source, self.layout, start, stop, into)

    def in_whole(self, error: InvalidArgument, start: int) -> InvalidArgument:
        """Return an error about a row counted from `start` as one that names the token's position in the grid."""
        return error.placed(grid_shape(self.source.shape, self.layout), start)

    def write(self, start: int, results: Array) -> None:
        """Copy the results of the rows from `start` on into the reply."""
        if results.ndim == 1:
            self.result.reshape(-1)[start : start + len(results)] = results
        else:
            write_tokens(results, self.result, self.layout, start)


class DecodeJob(Job):
    """Indices to latents.

    `source` holds indices of any integer type, in one of the shapes of `EncodeJob`'s result. `result` holds
    latents: of a type's `storage` (vqserve.dtypes).
    """

    def _check(self) -> None:
        tokenizer, axis = self.key.tokenizer, channel_axis(self.layout)
        sizes = tokenizer.info.stage_vocab_sizes
        check_indices(self.source, decodable=tokenizer.decodable, stage_sizes=sizes, axis=axis)

    def span(self, start: int, stop: int) -> Span:
        """Return where the rows [start, stop) are read and their latents are written."""
        return Span(self.result, self.source, self.layout, start, stop)

    def read(self, start: int, stop: int, into: Array) -> None:
        """Copy the rows [start, stop) into a batch."""
        if into.ndim == 1:
            into[:] = self.source.reshape(-1)[start:stop]
        else:
            read_tokens(self.source, self.layout, start, stop, into)

    def write(self, start: int, results: Array) -> None:
        """Copy the results of the rows from `start` on into the reply.

        Raises:
            InvalidOption: names a token with a value beyond the range of the reply's type.
        """
        overflow = first_overflow(results, self.result.dtype)
        if overflow is not None:
            dtype = LATENTS_BY_STORAGE[self.result.dtype]
            error = beyond_dtype(start + overflow, dtype.name, has_stages=self.key.num_quantizers is not None)
            raise error.placed(grid_shape(self.result.shape, self.layout))
        write_rows(results, self.result, self.layout, start)
