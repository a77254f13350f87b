"""Spans of OpenTelemetry for the calls of a client, where the process uses OpenTelemetry; the SDK does not need it.

A process that traces has imported `opentelemetry.trace`. In any other process a call costs one look at `sys.modules`.
Names and attributes are those of OpenTelemetry's conventions for RPC.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from vqserve import __version__
from vqserve.errors import VqserveError
from vqserve.trace import PROPAGATED, SERVICE_NAME
from vqserve_client.identity import Metadata

# The module that a process has imported which traces.
TRACING = "opentelemetry.trace"


class Span:
    """One encode or decode as the caller sees it: from its array to the result, retries included.

    Attributes:
        metadata: tells the server of the span.
    """

    def __init__(self, method: str, target: str) -> None:
        """Begin the span, below the one that is current in this thread or task; the process has imported `TRACING`.

        Args:
            method: name of the RPC.
            target: the server's address.
        """
        self._trace: Any = sys.modules[TRACING]
        tracer = self._trace.get_tracer("vqserve_client", __version__)
        attributes = {"rpc.system": "grpc", "rpc.service": SERVICE_NAME, "rpc.method": method, "server.address": target}
        name = f"{SERVICE_NAME}/{method}"
        self._span = tracer.start_span(name, kind=self._trace.SpanKind.CLIENT, attributes=attributes)
        self.metadata = _carried(self._trace.set_span_in_context(self._span))

    def end(self, **attributes: str | int) -> None:
        """End the span of a call that has its result, with attributes, whose names get the prefix "vqserve."."""
        for name, value in attributes.items():
            self._span.set_attribute(f"vqserve.{name}", value)
        self._span.end()

    def fail(self, error: BaseException) -> None:
        """End the span of a call that failed, or that the caller gave up."""
        if isinstance(error, Exception):
            self._span.set_attribute("error.type", type(error).__name__)
            self._span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, str(error)))
            if isinstance(error, VqserveError) and error.request_id:
                self._span.set_attribute("vqserve.request_id", error.request_id)
        self._span.end()


def _carried(context: Any) -> Metadata:
    """Return the metadata that carries a context to the server, by the propagators of the process."""
    propagate: Any = import_module("opentelemetry.propagate")

    carrier: dict[str, str] = {}
    propagate.inject(carrier, context=context)
    # Baggage is for the caller's own services.
    return tuple((key, carrier[key]) for key in PROPAGATED if key in carrier)
