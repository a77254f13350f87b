"""What one process counts, as plain additions to memory that its parent reads."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Protocol

from vqserve_server.metrics.families import FAMILIES, OPERATIONS, REQUESTS, ROWS, SECONDS
from vqserve_server.metrics.memory import private_part
from vqserve_server.metrics.store import NBYTES, Labels, Store, labels_of

# Statuses whose series are there before the first request has one: else the first would be no increase, and no alarm.
_FROM_ZERO = ("OK", "INTERNAL", "RESOURCE_EXHAUSTED", "UNAVAILABLE")


class Counted(Protocol):
    """A request that is counted once, however it ends: several threads may try.

    Attributes:
        is_counted: whether it is; false at first.
        rows: its tokens.
        message_bytes: its size.
    """

    is_counted: bool
    rows: int
    message_bytes: int


class FailedRequests:
    """The requests of an operation that did not end with status OK. Thread-safe."""

    def __init__(self, store: Store, codebook: str, operation: str) -> None:
        """Find the cells; a codebook of "" is for requests that name none that is served."""
        self._store = store
        self._labels = {"codebook": codebook, "operation": operation}
        self._cells = store.cells
        self._lock = threading.Lock()
        self._request_bytes = self._cell("request_bytes")
        self._by_status: dict[str, int] = {}

    def failed(self, status: str, message_bytes: int) -> None:
        """Count a request.

        Args:
            status: name of gRPC's status code.
            message_bytes: size of its message; 0: none was received.
        """
        with self._lock:
            self._count(status, message_bytes)

    def failed_once(self, request: Counted, status: str) -> None:
        """Count a request with that status, unless it is counted already."""
        with self._lock:
            if not request.is_counted:
                request.is_counted = True
                self._count(status, request.message_bytes)

    def _count(self, status: str, message_bytes: int) -> None:
        cell = self._by_status.get(status)
        if cell is None:
            cell = self._by_status[status] = self._cell("requests", status=status)
        self._cells[cell] += 1
        self._cells[self._request_bytes] += message_bytes

    # The cells of a histogram: what is at most a bound counts in the bucket of that bound; infinity and the sum follow.
    def _cell(self, name: str, **labels: str) -> int:
        return self._store.cell(name, FAMILIES[name].num_cells, **self._labels, **labels)


class OperationMetrics(FailedRequests):
    """The metrics of one operation of one codebook. Thread-safe.

    `answered` and `computed` are on the path of every request: each is a few additions under a lock that is held for
    nothing else. `with` would take as long as two of those. The collector derives two more families from them.
    """

    def __init__(self, store: Store, codebook: str, operation: str) -> None:
        """Find the cells."""
        super().__init__(store, codebook, operation)
        self._request_seconds = self._cell("request_seconds")
        self._request_seconds_sum = self._request_seconds + len(SECONDS) + 1
        self._queue_seconds = self._cell("queue_seconds")
        self._queue_seconds_sum = self._queue_seconds + len(SECONDS) + 1
        self._compute_seconds = self._cell("compute_seconds")
        self._compute_seconds_sum = self._compute_seconds + len(SECONDS) + 1
        self._batch_rows = self._cell("batch_rows")
        self._batch_rows_sum = self._batch_rows + len(ROWS) + 1
        self._batch_requests = self._cell("batch_requests")
        self._batch_requests_sum = self._batch_requests + len(REQUESTS) + 1
        self._tokens = self._cell("tokens")
        self._reply_bytes = self._cell("reply_bytes")

    def answered(self, request: Counted, seconds: float, queue_s: float, reply_bytes: int) -> None:
        """Count a request with status OK, unless it is counted already.

        Args:
            request: the request.
            seconds: from its message to its reply.
            queue_s: how much of that it waited for the device.
            reply_bytes: size of the reply.
        """
        cells = self._cells
        self._lock.acquire()
        try:
            if request.is_counted:
                return
            request.is_counted = True
            cells[self._request_seconds + bisect_left(SECONDS, seconds)] += 1.0
            cells[self._request_seconds_sum] += seconds
            cells[self._queue_seconds + bisect_left(SECONDS, queue_s)] += 1.0
            cells[self._queue_seconds_sum] += queue_s
            cells[self._tokens] += request.rows
            cells[self._request_bytes] += request.message_bytes
            cells[self._reply_bytes] += reply_bytes
        finally:
            self._lock.release()

    def computed(self, requests: int, rows: int, seconds: float) -> None:
        """Count a batch.

        Args:
            requests: requests that it has rows of.
            rows: its rows.
            seconds: that the computation took.
        """
        cells = self._cells
        self._lock.acquire()
        try:
            cells[self._compute_seconds + bisect_left(SECONDS, seconds)] += 1.0
            cells[self._compute_seconds_sum] += seconds
            cells[self._batch_rows + bisect_left(ROWS, rows)] += 1.0
            cells[self._batch_rows_sum] += rows
            cells[self._batch_requests + bisect_left(REQUESTS, requests)] += 1.0
            cells[self._batch_requests_sum] += requests
        finally:
            self._lock.release()


class Metrics:
    """All that a process counts. Thread-safe."""

    def __init__(self, memory: memoryview | None = None) -> None:
        """Go on with what is in the memory; None: in memory of its own."""
        self._store = Store(private_part(NBYTES) if memory is None else memory)
        self._lock = threading.Lock()
        self._operations: dict[tuple[str, str], OperationMetrics] = {}
        self._unresolved = {each: FailedRequests(self._store, "", each) for each in OPERATIONS}
        self._busy_device: object = None
        self._busy_cell = 0
        self._published: dict[Labels, int] = {}

    def operation(self, codebook: str, operation: str) -> OperationMetrics:
        """Return the metrics of an operation, "encode" or "decode", of a codebook that is served."""
        key = codebook, operation
        found = self._operations.get(key)
        if found is None:
            with self._lock:
                # Two objects would not share a lock.
                found = self._operations.setdefault(key, OperationMetrics(self._store, *key))
        return found

    def unresolved(self, operation: str) -> FailedRequests:
        """Return the metrics of requests that ended before their codebook was known."""
        return self._unresolved[operation]

    def publish(self, codebooks: Iterable[Mapping[str, str]]) -> None:
        """Say which codebooks are served from now on, by the labels of `codebook_info`."""
        before = self._published
        self._published = {labels_of(each): self._store.cell("codebook_info", **each) for each in codebooks}
        for labels, cell in {**before, **self._published}.items():
            self._store.cells[cell] = labels in self._published
        for each in self._published:
            for operation in OPERATIONS:
                for status in _FROM_ZERO:
                    self._store.cell("requests", codebook=dict(each)["codebook"], operation=operation, status=status)

    def busy(self, device: object, seconds: float) -> None:
        """Count time in which a device had batches; for one thread at a time."""
        if device is not self._busy_device:
            self._busy_device = device
            self._busy_cell = self._store.cell("device_busy_seconds", device=str(device))
        self._store.cells[self._busy_cell] += seconds

    def add(self, name: str, amount: float = 1, /, **labels: str) -> None:
        """Add to a counter; not for what every request counts."""
        cell = self._store.cell(name, **labels)
        with self._lock:
            self._store.cells[cell] += amount

    def set(self, name: str, value: float, /, **labels: str) -> None:
        """Set a gauge."""
        self._store.cells[self._store.cell(name, **labels)] = value
