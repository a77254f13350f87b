"""What both sides of a traced call know: how it is named, and the metadata that connects its spans."""

from __future__ import annotations

from typing import Final

from vqserve.v1 import tokenizer_pb2 as pb

SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["TokenizerService"].full_name
# W3C's Trace Context, which is what OpenTelemetry's default propagator writes.
PROPAGATED: Final = ("traceparent", "tracestate")
