"""One validated request on its way through the engine."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from vqserve.layout import Layout, grid_shape
from vqserve.validation import beyond_dtype
from vqserve_server.engine.rows import first_overflow, read_rows, read_tokens, write_rows, write_tokens
from vqserve_server.errors import Cancelled, DeadlineExceeded, InvalidArgument

if TYPE_CHECKING:
    from vqserve_server.tokenizer import Tokenizer

Array = npt.NDArray[Any]
Output = Literal["latents", "code_rows"]


@dataclass(frozen=True)
class EncodeKey:
    """What rows must share to be encoded in one batch."""

    tokenizer: Tokenizer
    dtype: np.dtype[Any]  # float32 or float64: the type after widening
    num_quantizers: int | None = None  # indices that a token gets, as an axis; None: one, without an axis
    rows_counted_as_one: ClassVar[int] = 1  # against max_batch_rows

    def __hash__(self) -> int:
        return id(self.tokenizer)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row and its result."""
        return self.tokenizer.info.input_dim * self.dtype.itemsize + 8 * (self.num_quantizers or 1)

    @property
    def rows_dtype(self) -> np.dtype[Any]:
        """Type of the rows that `compute` takes."""
        return self.dtype

    def rows_shape(self, rows: int) -> tuple[int, ...]:
        """Return the shape of that many of them."""
        return rows, self.tokenizer.info.input_dim

    def compute(self, rows: Array) -> Array:
        """Return the indices of rows (n, C): (n,) or (n, num_quantizers)."""
        return self.tokenizer.encode_rows(rows, num_quantizers=self.num_quantizers)


@dataclass(frozen=True)
class DecodeKey:
    """What indices must share to be decoded in one batch."""

    tokenizer: Tokenizer
    output: Output
    dtype: np.dtype[Any]  # of the reply, as in DecodeJob
    num_quantizers: int | None = None  # indices of a token that are used, an axis; None: its one, without an axis
    rows_counted_as_one: ClassVar[int] = 4  # against max_batch_rows: what is looked up costs less than what is searched

    def __hash__(self) -> int:
        return id(self.tokenizer)

    @property
    def channels(self) -> int:
        """Width of what is returned."""
        info = self.tokenizer.info
        return info.code_dim if self.output == "code_rows" else info.output_dim

    @property
    def row_bytes(self) -> int:
        """Bytes of a token's indices and its result, which is float64 at most."""
        return 8 * (self.num_quantizers or 1) + 8 * self.channels

    @property
    def rows_dtype(self) -> np.dtype[Any]:
        """Type of the indices that `compute` takes."""
        return np.dtype(np.int64)

    def rows_shape(self, rows: int) -> tuple[int, ...]:
        """Return the shape of the indices of that many tokens."""
        return (rows,) if self.num_quantizers is None else (rows, self.num_quantizers)

    def compute(self, indices: Array) -> Array:
        """Return the rows (n, channels) of indices, (n,) or (n, num_quantizers); see `Tokenizer.decode_rows`."""
        return self.tokenizer.decode_rows(indices, output=self.output, dtype=self.dtype)


Key = EncodeKey | DecodeKey


class Served(NamedTuple):
    """How the time of a finished job went."""

    queue_us: int
    compute_us: int
    batch_requests: int
    batch_rows: int


# Told, from whatever thread, of jobs that have just got their outcomes.
Deliver: TypeAlias = "Callable[[list[Job]], None]"

# Held for a comparison or a sum only, so that one serves all jobs.
_outcomes = threading.Lock()


class Job(ABC):
    """Rows in, rows out, and an outcome that is set exactly once: by the first who has one.

    The queue's lock guards `next_row`. The parts of a job may be computed by several threads at once.

    Attributes:
        outcome: None until there is one; an error if the job failed.
        tag: by which `deliver` knows whose job it is.
        owner: what the memory of the result belongs to.
    """

    def __init__(
        self,
        key: Key,
        source: Array,
        result: Array,
        rows: int,
        *,
        deadline: float | None,
        deliver: Deliver,
        tag: Any,
        owner: Any,
    ) -> None:
        self.key = key
        self.source = source
        self.result = result
        self.rows = rows
        self.deadline = deadline  # time.monotonic() seconds
        self.deliver = deliver
        self.tag = tag
        self.owner = owner
        self.outcome: Served | BaseException | None = None
        self.next_row = 0  # rows before it are in a batch
        self.waiting_since = time.monotonic()
        self.arrived = self.waiting_since
        self._rows_done = 0
        self._queue_s = self._compute_s = 0.0
        self._batch_requests = self._batch_rows = 0

    @abstractmethod
    def read(self, start: int, stop: int, into: Array) -> None:
        """Copy the rows [start, stop) into a batch."""

    @abstractmethod
    def write(self, start: int, results: Array) -> None:
        """Copy the results of the rows from `start` on into the reply.

        Raises:
            InvalidArgument: the reply cannot hold them; concerns nobody else's.
        """

    def in_whole(self, error: InvalidArgument, start: int) -> InvalidArgument:
        """Return an error about the rows from `start` on as one about the whole request."""
        return error

    def resolve(self, outcome: Served | BaseException) -> bool:
        """Set the outcome; False if there was one already."""
        with _outcomes:
            if self.outcome is not None:
                return False
            self.outcome = outcome
        return True

    def fail(self, error: BaseException) -> bool:
        """Resolve and deliver the job with an error; False if it had an outcome already."""
        if not self.resolve(error):
            return False
        self.deliver([self])
        return True

    def cancel(self) -> None:
        """Say that nobody waits for the job any more."""
        self.resolve(Cancelled("the caller has left"))

    def alive(self, now: float) -> bool:
        """Return whether somebody still waits for the job; an expired one is failed here."""
        if self.deadline is not None and self.deadline <= now:
            self.fail(DeadlineExceeded("the deadline passed before the request was computed"))
        return self.outcome is None

    def finish(self, rows: int, *, started: float, ended: float, batch: tuple[int, int]) -> bool:
        """Count a part whose results are written; return whether it was the last one, which resolves the job.

        Whoever gets True delivers the job, with others of its batch.

        Args:
            rows: the part's rows.
            started: when the device began with its batch, in time.monotonic() seconds.
            ended: when it had finished.
            batch: requests and rows of that batch.
        """
        with _outcomes:
            self._rows_done += rows
            self._queue_s += max(started - self.waiting_since, 0.0)
            self._compute_s += ended - started
            self.waiting_since = ended
            if batch[1] > self._batch_rows:
                self._batch_requests, self._batch_rows = batch
            if self._rows_done < self.rows or self.outcome is not None:
                return False
            self.outcome = Served(
                round(self._queue_s * 1e6),
                round(self._compute_s * 1e6),
                self._batch_requests,
                self._batch_rows,
            )
        return True


class EncodeJob(Job):
    """Latents to indices."""

    def __init__(
        self,
        key: EncodeKey,
        latents: Array,
        layout: Layout,
        indices: Array,
        *,
        deliver: Deliver,
        tag: Any = None,
        owner: Any = None,
        deadline: float | None = None,
    ) -> None:
        """Make the job.

        Args:
            key: the codebook, and the latents' type after widening.
            latents: validated; float16, float32, float64, or uint16 for bfloat16's bit patterns.
            layout: where its channels are.
            indices: the reply, to be written, of a type that holds the vocabulary: shaped like the grid, or, where the
                key has a number of quantizers, like the latents with so many indices in the place of the channels.
            deliver: told when there is an outcome.
            tag: by which `deliver` knows whose job it is.
            owner: what the memory of the result belongs to, if it is not the array's own.
            deadline: time.monotonic() seconds, or None.
        """
        rows = indices.size // (key.num_quantizers or 1)
        super().__init__(key, latents, indices, rows, deadline=deadline, deliver=deliver, tag=tag, owner=owner)
        self._layout = layout
        self._flat = indices.reshape(-1)

    def read(self, start: int, stop: int, into: Array) -> None:
        """Copy the rows [start, stop) into a batch."""
        read_rows(self.source, self._layout, start, stop, into)

    def in_whole(self, error: InvalidArgument, start: int) -> InvalidArgument:
        """Return an error about the rows from `start` on, which have no grid, with the token's place in the grid."""
        return error.placed(grid_shape(self.source.shape, self._layout), start)

    def write(self, start: int, results: Array) -> None:
        """Copy the results of the rows from `start` on into the reply."""
        if results.ndim == 1:
            self._flat[start : start + len(results)] = results
        else:
            write_tokens(results, self.result, self._layout, start)


class DecodeJob(Job):
    """Indices to latents."""

    def __init__(
        self,
        key: DecodeKey,
        indices: Array,
        latents: Array,
        layout: Layout,
        *,
        deliver: Deliver,
        tag: Any = None,
        owner: Any = None,
        deadline: float | None = None,
    ) -> None:
        """Make the job.

        Args:
            key: the codebook, which of its rows, and the type of the reply.
            indices: validated; any integer type; shaped like the grid, or, where the key has a number of quantizers,
                like the latents with so many indices in the place of the channels.
            latents: the reply, to be written: float16, float32, float64, or uint16 for bfloat16's bit patterns.
            layout: where its channels are, and the indices of a token.
            deliver: told when there is an outcome.
            tag: by which `deliver` knows whose job it is.
            owner: what the memory of the result belongs to, if it is not the array's own.
            deadline: time.monotonic() seconds, or None.
        """
        source = indices.reshape(-1) if key.num_quantizers is None else indices
        rows = indices.size // (key.num_quantizers or 1)
        super().__init__(key, source, latents, rows, deadline=deadline, deliver=deliver, tag=tag, owner=owner)
        self._layout = layout

    def read(self, start: int, stop: int, into: Array) -> None:
        """Copy the rows [start, stop) into a batch."""
        if into.ndim == 1:
            into[:] = self.source[start:stop]
        else:
            read_tokens(self.source, self._layout, start, stop, into)

    def write(self, start: int, results: Array) -> None:
        """Copy the results of the rows from `start` on into the reply.

        Raises:
            InvalidOption: names a token with a value beyond the range of the reply's type.
        """
        overflow = first_overflow(results, self.result.dtype)
        if overflow is not None:
            dtype = "bfloat16" if self.result.dtype == np.uint16 else self.result.dtype.name
            raise beyond_dtype(start + overflow, dtype, has_stages=self.source.ndim > 1).placed(
                grid_shape(self.result.shape, self._layout)
            )
        write_rows(results, self.result, self._layout, start)
