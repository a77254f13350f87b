"""Spans of OpenTelemetry for requests: their time in the queue and on the device, below the caller's own span.

Only requests of traced callers, or a share of the others, cost anything: their spans are made when they are answered,
and sent to a collector by a thread of OpenTelemetry's.
"""

from __future__ import annotations

import logging
import threading
import time

import grpc
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

from vqserve import __version__
from vqserve.trace import PROPAGATED, SERVICE_NAME
from vqserve_server.config import TracesConfig
from vqserve_server.engine import RequestTiming
from vqserve_server.rpc.call import Call

# A collector that does not answer holds up nothing but the thread that waits for it, and the end of the process.
_EXPORT_S = 5.0
_CLOSE_S = 2.0
# It writes a line with all that a caller sent for each header that is not well-formed: any caller could fill the log.
_HEADERS_LOGGER = "opentelemetry.trace"


class Tracing:
    """Decides which calls are traced, and sends their spans."""

    def __init__(self, config: TracesConfig, *, worker: int | None = None) -> None:
        """Start the thread that sends.

        Args:
            config: where to send them, and how many.
            worker: number of this process among several that serve a port; None if it is the only one.
        """
        logging.getLogger(_HEADERS_LOGGER).setLevel(logging.ERROR)
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES add to these and override them.
        own = {"service.name": "vqserve", "service.version": __version__}
        resource = Resource(own | ({} if worker is None else {"service.instance.id": str(worker)}))
        self._provider = TracerProvider(
            resource=resource.merge(OTELResourceDetector().detect()),
            sampler=ParentBasedTraceIdRatio(config.trace_ratio),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(endpoint=config.trace_endpoint, timeout=_EXPORT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("vqserve_server", __version__)
        self._takes_others = config.trace_ratio > 0

    def begin(self, call: Call) -> CallTrace | None:
        """Return what makes the spans of a call; None: it has none."""
        carrier = {key: value for key, value in call.metadata if key in PROPAGATED and isinstance(value, str)}
        if not carrier and not self._takes_others:
            return None
        context = propagate.extract(carrier)
        parent = trace.get_current_span(context).get_span_context()
        if parent.is_valid and not parent.trace_flags.sampled:
            return None
        return CallTrace(self._tracer, context, call.method.rpartition("/")[2], call.request_id)

    def close(self) -> None:
        """Send what is left, if the collector answers soon."""
        # Both wait for one export after the other, whatever limit they are given.
        closing = threading.Thread(target=self._provider.shutdown, name="vqserve-traces-end", daemon=True)
        closing.start()
        closing.join(_CLOSE_S)


class CallTrace:
    """Makes the spans of one call's requests."""

    def __init__(self, tracer: trace.Tracer, parent: Context, method: str, request_id: str) -> None:
        self._tracer = tracer
        self._parent = parent
        self._method = method
        self._request_id = request_id

    def answered(self, timing: RequestTiming | None, *, codebook: str, rows: int, received_at: float) -> None:
        """Make the spans of a request that has its reply.

        Args:
            timing: its times; None: there was nothing to compute.
            codebook: its name.
            rows: tokens of the request.
            received_at: when its message was there, in time.monotonic() seconds.
        """
        start = _wall_ns(received_at)
        span = self._span(start)
        span.set_attributes({"vqserve.codebook": codebook, "vqserve.rows": rows})
        if timing is not None:
            end = time.time_ns()
            # A request that is split waits and computes by turns: these are the sums.
            compute_start = max(end - 1000 * timing.compute_us, start)
            queue_start = max(compute_start - 1000 * timing.queue_us, start)
            self._part(span, "queue", queue_start, compute_start)
            attributes = {"vqserve.batch.requests": timing.batch_requests, "vqserve.batch.rows": timing.batch_rows}
            self._part(span, "compute", compute_start, end, attributes)
        span.end()

    def failed(self, code: grpc.StatusCode, error: BaseException, received_at: float) -> None:
        """Make the span of a request that failed with that status."""
        span = self._span(_wall_ns(received_at))
        span.set_attributes({"rpc.grpc.status_code": code.value[0], "error.type": type(error).__name__})
        span.set_status(trace.Status(trace.StatusCode.ERROR, code.name))
        span.end()

    def _span(self, start: int) -> trace.Span:
        attributes = {
            "rpc.system": "grpc",
            "rpc.service": SERVICE_NAME,
            "rpc.method": self._method,
            "vqserve.request_id": self._request_id,
        }
        name = f"{SERVICE_NAME}/{self._method}"
        return self._tracer.start_span(
            name, context=self._parent, kind=trace.SpanKind.SERVER, attributes=attributes, start_time=start
        )

    def _part(
        self, span: trace.Span, name: str, start: int, end: int, attributes: dict[str, int] | None = None
    ) -> None:
        context = trace.set_span_in_context(span)
        self._tracer.start_span(name, context=context, attributes=attributes, start_time=start).end(end)


def _wall_ns(at: float) -> int:
    return time.time_ns() - round((time.monotonic() - at) * 1e9)
