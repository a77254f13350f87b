"""All metrics: their names, kinds, labels and meanings, in one table, from which docs/metrics.md is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

PREFIX = "vqserve_"
OPERATIONS = ("encode", "decode")

Kind = Literal["counter", "gauge", "histogram"]

# Upper bounds in seconds: from the time of a small request to --max-queue-ms, with round numbers for objectives.
SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
ROWS = tuple(4**power for power in range(10))
REQUESTS = tuple(2**power for power in range(11))


@dataclass(frozen=True)
class Family:
    """One metric.

    Attributes:
        name: without the prefix and `_total`.
        kind: as Prometheus has them.
        help: what it is, with its unit.
        labels: their names.
        buckets: upper bounds of a histogram, without infinity.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def full_name(self) -> str:
        """The name as it is queried."""
        return f"{PREFIX}{self.name}{'_total' if self.kind == 'counter' else ''}"

    @property
    def num_cells(self) -> int:
        """Numbers that are kept: of a histogram a count for each bucket, one for infinity, and the sum."""
        return len(self.buckets) + 2 if self.kind == "histogram" else 1


_OPERATION = ("codebook", "operation")
_STAGE = ("codebook", "stage")
_CODEBOOK = ("codebook", "digest", "kind", "num_codes", "code_dim", "num_quantizers", "search", "device")
_QUEUE = "requests, rows and bytes count from the message until its reply is sent"

_TABLE = (
    Family("requests", "counter", "Requests that have ended, each message of a stream one.", (*_OPERATION, "status")),
    Family(
        "request_seconds",
        "histogram",
        "Time from a message to its reply, of requests with status OK.",
        _OPERATION,
        SECONDS,
    ),
    Family(
        "queue_seconds", "histogram", "Time that a request with status OK waited for the device.", _OPERATION, SECONDS
    ),
    Family("compute_seconds", "histogram", "Time that the computation of a batch took.", _OPERATION, SECONDS),
    Family("batch_rows", "histogram", "Rows of a batch.", _OPERATION, ROWS),
    Family("batch_requests", "histogram", "Requests that a batch has rows of.", _OPERATION, REQUESTS),
    Family(
        "rows",
        "counter",
        "Rows that were computed, also of requests that failed later and of the server's own checks.",
        _OPERATION,
    ),
    Family("tokens", "counter", "Tokens of requests with status OK.", _OPERATION),
    Family("request_bytes", "counter", "Bytes of the messages of requests.", _OPERATION),
    Family("reply_bytes", "counter", "Bytes of the messages of replies.", _OPERATION),
    Family("refused", "counter", "Requests that were refused for load, by what there was too much of.", ("reason",)),
    Family("expired", "counter", "Requests whose deadline passed, by where that was noticed.", ("where",)),
    Family(
        "rechecked_rows",
        "counter",
        "Rows that the fast search left open and higher precision decided; with stages, in each.",
        ("codebook",),
    ),
    Family("queue_requests", "gauge", f"Requests in the server; {_QUEUE}.", ("worker",)),
    Family("queue_rows", "gauge", "Rows of the requests in the server.", ("worker",)),
    Family("queue_bytes", "gauge", "Bytes of the requests in the server and of their replies.", ("worker",)),
    Family("queue_requests_limit", "gauge", "Most requests in the server (--max-queue-requests).", ("worker",)),
    Family("queue_rows_limit", "gauge", "Most rows in the server (--max-queue-rows).", ("worker",)),
    Family("queue_bytes_limit", "gauge", "Most bytes in the server (--max-queue-bytes).", ("worker",)),
    Family("open_calls", "gauge", "Calls that were accepted and have not ended, streams included.", ("worker",)),
    Family("connections", "gauge", "Open connections of callers.", ("worker",)),
    Family(
        "device_busy_seconds",
        "counter",
        "Time in which the device had a batch; its rate is the share of the time that it was busy.",
        ("worker", "device"),
    ),
    Family("device_memory_bytes", "gauge", "Memory of the device that the process has reserved.", ("worker", "device")),
    Family("process_resident_bytes", "gauge", "Memory of the process.", ("worker",)),
    Family("serving", "gauge", "1 if health checks are answered with SERVING, else 0.", ("worker",)),
    Family("workers", "gauge", "Processes that are to serve (--workers)."),
    Family("workers_ready", "gauge", "Processes that have loaded their codebooks and serve."),
    Family("worker_restarts", "counter", "Workers that ended and were started again."),
    Family("reloads", "counter", "Reloads of the codebooks, by result; each worker has its own.", ("result",)),
    Family("codebook_info", "gauge", "1 for each codebook that is served.", _CODEBOOK),
    Family(
        "codebook_sampled_rows",
        "counter",
        "Rows that were sampled for the codebook's health, since a codebook of this name was first loaded.",
        ("codebook",),
    ),
    Family("codebook_window_rows", "gauge", "Sampled rows that the following figures are about.", _STAGE),
    Family("codebook_used_ratio", "gauge", "Share of the codes that a row of the window has.", _STAGE),
    Family("codebook_dead_codes", "gauge", "Codes that no row of the window has.", _STAGE),
    Family(
        "codebook_perplexity",
        "gauge",
        "Number of equally used codes with the same entropy, over the rows of the window.",
        _STAGE,
    ),
    Family(
        "codebook_drift_bits",
        "gauge",
        "Jensen-Shannon divergence of the use of codes from that in the codebook's file, corrected for chance.",
        _STAGE,
    ),
    Family("codebook_error", "gauge", "Mean squared error of a channel, over the rows of the window.", ("codebook",)),
    Family("codebook_error_ratio", "gauge", "That error divided by the one in the codebook's file.", ("codebook",)),
    Family("build_info", "gauge", "1; the labels say what runs.", ("version", "python", "torch", "grpcio")),
    Family("start_time_seconds", "gauge", "When the server was started, in seconds since 1970."),
    Family(
        "certificate_expiry_timestamp_seconds",
        "gauge",
        "When the certificate expires, in seconds since 1970.",
        ("file",),
    ),
)

FAMILIES: Mapping[str, Family] = MappingProxyType({family.name: family for family in _TABLE})


def metrics_table() -> str:
    """Return the table of docs/metrics.md, in Markdown."""
    lines = ["| Metric | Kind | Labels | Meaning |", "|---|---|---|---|"]
    for family in FAMILIES.values():
        labels = ", ".join(f"`{label}`" for label in family.labels)
        lines.append(f"| `{family.full_name}` | {family.kind} | {labels} | {family.help} |")
    return "\n".join(lines)
