"""What one process counts, as plain additions to memory that its parent reads."""

from __future__ import annotations

import threading
from bisect import bisect_left

from vqserve_server.metrics.families import FAMILIES, REQUESTS, ROWS, SECONDS
from vqserve_server.metrics.memory import private_part
from vqserve_server.metrics.store import NBYTES, Store

# Histograms count what is at most a bound in the bucket of that bound; infinity and the sum follow.
_SUM_OF_SECONDS = len(SECONDS) + 1
_MOST_ROWS, _MOST_REQUESTS = len(ROWS), len(REQUESTS)


class OperationMetrics:
    """The metrics of one operation of one codebook. Thread-safe.

    Its methods are on the path of every request: each is a few additions under a lock that is held for nothing else.
    """

    def __init__(self, store: Store, codebook: str, operation: str) -> None:
        """Find the cells; a codebook of "" is for requests that name none that is served."""
        self._store = store
        self._labels = {"codebook": codebook, "operation": operation}
        self._cells = store.cells
        self._lock = threading.Lock()
        self._ok = self._cell("requests", status="OK")
        self._request_seconds = self._cell("request_seconds")
        self._queue_seconds = self._cell("queue_seconds")
        self._compute_seconds = self._cell("compute_seconds")
        self._batch_rows = self._cell("batch_rows")
        self._batch_requests = self._cell("batch_requests")
        self._rows = self._cell("rows")
        self._tokens = self._cell("tokens")
        self._request_bytes = self._cell("request_bytes")
        self._reply_bytes = self._cell("reply_bytes")
        self._failed: dict[str, int] = {}

    def answered(self, seconds: float, queue_s: float, rows: int, request_bytes: int, reply_bytes: int) -> None:
        """Count a request with status OK.

        Args:
            seconds: from its message to its reply.
            queue_s: how much of that it waited for the device.
            rows: its tokens.
            request_bytes: size of the message.
            reply_bytes: size of the reply.
        """
        cells = self._cells
        with self._lock:
            cells[self._ok] += 1
            cells[self._request_seconds + bisect_left(SECONDS, seconds)] += 1
            cells[self._request_seconds + _SUM_OF_SECONDS] += seconds
            cells[self._queue_seconds + bisect_left(SECONDS, queue_s)] += 1
            cells[self._queue_seconds + _SUM_OF_SECONDS] += queue_s
            cells[self._tokens] += rows
            cells[self._request_bytes] += request_bytes
            cells[self._reply_bytes] += reply_bytes

    def failed(self, status: str, request_bytes: int) -> None:
        """Count a request that has ended with another status.

        Args:
            status: name of gRPC's status code.
            request_bytes: size of the message; 0: none was received.
        """
        with self._lock:
            cell = self._failed.get(status)
            if cell is None:
                cell = self._failed[status] = self._cell("requests", status=status)
            self._cells[cell] += 1
            self._cells[self._request_bytes] += request_bytes

    def computed(self, requests: int, rows: int, seconds: float) -> None:
        """Count a batch.

        Args:
            requests: requests that it has rows of.
            rows: its rows.
            seconds: that the computation took.
        """
        cells = self._cells
        with self._lock:
            cells[self._compute_seconds + bisect_left(SECONDS, seconds)] += 1
            cells[self._compute_seconds + _SUM_OF_SECONDS] += seconds
            # The bounds are powers of 4 and of 2.
            cells[self._batch_rows + min(((rows - 1).bit_length() + 1) // 2, _MOST_ROWS)] += 1
            cells[self._batch_rows + _MOST_ROWS + 1] += rows
            cells[self._batch_requests + min((requests - 1).bit_length(), _MOST_REQUESTS)] += 1
            cells[self._batch_requests + _MOST_REQUESTS + 1] += requests
            cells[self._rows] += rows

    def _cell(self, name: str, **labels: str) -> int:
        return self._store.cell(name, FAMILIES[name].num_cells, **self._labels, **labels)


class Metrics:
    """All that a process counts. Thread-safe."""

    def __init__(self, memory: memoryview | None = None) -> None:
        """Go on with what is in the memory; None: in memory of its own."""
        self._store = Store(private_part(NBYTES) if memory is None else memory)
        self._lock = threading.Lock()
        self._operations: dict[tuple[str, str], OperationMetrics] = {}

    def operation(self, codebook: str, operation: str) -> OperationMetrics:
        """Return the metrics of an operation, "encode" or "decode", of a codebook; "": requests that have none."""
        key = codebook, operation
        found = self._operations.get(key)
        if found is None:
            with self._lock:
                # Two objects would not share a lock.
                found = self._operations.setdefault(key, OperationMetrics(self._store, *key))
        return found

    def add(self, name: str, amount: float = 1, /, **labels: str) -> None:
        """Add to a counter."""
        cell = self._store.cell(name, **labels)
        with self._lock:
            self._store.cells[cell] += amount

    def set(self, name: str, value: float, /, **labels: str) -> None:
        """Set a gauge."""
        self._store.cells[self._store.cell(name, **labels)] = value
