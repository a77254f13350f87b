"""A trace from the SDK's call to the batch, as a collector receives it."""

from __future__ import annotations

import asyncio
import gzip
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from support.waiting import eventually
from vqserve.error_wire import REQUEST_ID_KEY
from vqserve.errors import NonFiniteLatents
from vqserve_client import AsyncClient, Client
from vqserve_server.codebooks import save_codebook
from vqserve_server.config import TracesConfig
from vqserve_server.quantizers import VectorQuantizer
from vqserve_server.rpc import tracing

ENCODE = "vqserve.v1.TokenizerService/Encode"
LATENTS = np.zeros((1, 2, 4), np.float32)


@dataclass
class Collector:
    """An OpenTelemetry collector: keeps the spans that are sent to it."""

    url: str = ""
    services: set[str] = field(default_factory=set)
    spans: list[Span] = field(default_factory=list)

    def take(self, body: bytes) -> None:
        """Keep the spans of a request."""
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.services |= {
                each.value.string_value for each in resource.resource.attributes if each.key == "service.name"
            }
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]

    def named(self, name: str) -> list[Span]:
        """Return the spans with that name."""
        return [span for span in self.spans if span.name == name]


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector on a port of its own."""
    kept = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            kept.take(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    kept.url = f"http://127.0.0.1:{server.server_port}/v1/traces"
    yield kept
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One codebook, `book`."""
    torch.manual_seed(0)
    save_codebook(VectorQuantizer(16, 4), tmp_path / "book.safetensors")
    return tmp_path


@contextmanager
def tracing_process() -> Iterator[InMemorySpanExporter]:
    """This process uses OpenTelemetry for a while."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "get_tracer", lambda name, version=None: provider.get_tracer(name, version))
        yield exporter


def attributes(span: Span) -> dict[str, Any]:
    """Return the attributes of a span."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_call_is_one_trace_from_the_client_to_the_batch(
    vqserved: Callable[..., Any], folder: Path, collector: Collector, workers: str
) -> None:
    daemon = vqserved(folder, "--device", "cpu", "--workers", workers, "--trace-endpoint", collector.url)
    with tracing_process() as exporter, Client(daemon.target) as client:
        client.encode(LATENTS)
    assert daemon.stop(signal.SIGTERM)[0] == 0
    [own] = exporter.get_finished_spans()
    assert own.name == ENCODE
    assert own.kind is trace.SpanKind.CLIENT
    assert own.attributes is not None
    assert own.attributes["vqserve.codebook"] == "book"
    [served] = collector.named(ENCODE)
    assert collector.services == {"vqserve"}
    assert served.kind == Span.SPAN_KIND_SERVER
    assert int.from_bytes(served.trace_id, "big") == own.context.trace_id
    assert int.from_bytes(served.parent_span_id, "big") == own.context.span_id
    assert attributes(served) | {"vqserve.codebook": "book", "vqserve.rows": 2} == attributes(served)
    [queue], [compute] = collector.named("queue"), collector.named("compute")
    for part in (queue, compute):
        assert part.parent_span_id == served.span_id
        assert served.start_time_unix_nano <= part.start_time_unix_nano <= part.end_time_unix_nano
        assert part.end_time_unix_nano <= served.end_time_unix_nano
    assert queue.end_time_unix_nano == compute.start_time_unix_nano
    assert attributes(compute) == {"vqserve.batch.requests": 1, "vqserve.batch.rows": 2}


def test_an_asynchronous_client_and_a_stream_are_traced(
    vqserved: Callable[..., Any], folder: Path, collector: Collector
) -> None:
    daemon = vqserved(folder, "--device", "cpu", "--trace-endpoint", collector.url)

    async def call() -> None:
        async with AsyncClient(daemon.target) as client:
            await client.encode(LATENTS)
            async for _ in client.encode_many([LATENTS] * 5, layout="channels_last"):
                pass

    with tracing_process() as exporter:
        asyncio.run(call())
    assert daemon.stop(signal.SIGTERM)[0] == 0
    one, *many = exporter.get_finished_spans()
    traces = {span.context.trace_id for span in (one, *many)}
    served = [span for span in collector.spans if span.kind == Span.SPAN_KIND_SERVER]
    assert {int.from_bytes(span.trace_id, "big") for span in served} <= traces
    assert one.context.trace_id in {int.from_bytes(span.trace_id, "big") for span in served}
    assert {span.name for span in served} == {ENCODE, f"{ENCODE}Stream"}


def test_a_request_that_fails_is_a_span_with_its_status(
    vqserved: Callable[..., Any], folder: Path, collector: Collector
) -> None:
    daemon = vqserved(folder, "--device", "cpu", "--trace-endpoint", collector.url)
    with (
        tracing_process() as exporter,
        Client(daemon.target) as client,
        pytest.raises(NonFiniteLatents) as caught,
    ):
        client.encode(np.full_like(LATENTS, np.nan))
    assert daemon.stop(signal.SIGTERM)[0] == 0
    [own] = exporter.get_finished_spans()
    assert own.status.status_code is trace.StatusCode.ERROR
    [served] = collector.named(ENCODE)
    found = attributes(served)
    assert found["rpc.grpc.status_code"] == 3
    assert found["error.type"] == "NonFiniteLatents"
    assert found["vqserve.request_id"] == caught.value.request_id


def test_a_caller_without_a_request_id_finds_its_span_by_the_one_of_the_error(
    vqserved: Callable[..., Any], folder: Path, collector: Collector
) -> None:
    daemon = vqserved(folder, "--device", "cpu", "--trace-endpoint", collector.url, "--trace-ratio", "1")
    with grpc.insecure_channel(daemon.target) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(f"/{ENCODE}")(b"")
    assert daemon.stop(signal.SIGTERM)[0] == 0
    failure: Any = caught.value
    [served] = collector.named(ENCODE)
    assert dict(failure.trailing_metadata())[REQUEST_ID_KEY] == attributes(served)["vqserve.request_id"]


def test_only_traced_callers_are_traced_unless_a_share_is_asked_for(
    vqserved: Callable[..., Any], folder: Path, collector: Collector
) -> None:
    for ratio, spans in (("0", 0), ("1", 3)):
        daemon = vqserved(folder, "--device", "cpu", "--trace-endpoint", collector.url, "--trace-ratio", ratio)
        with Client(daemon.target) as client:
            for _ in range(3):
                client.encode(LATENTS)
        assert daemon.stop(signal.SIGTERM)[0] == 0
        assert len(collector.named(ENCODE)) == spans


def test_a_caller_that_is_not_sampled_has_no_span(
    vqserved: Callable[..., Any], folder: Path, collector: Collector
) -> None:
    daemon = vqserved(folder, "--device", "cpu", "--trace-endpoint", collector.url, "--trace-ratio", "1")
    not_sampled = f"00-{'1' * 32}-{'2' * 16}-00"
    nonsense = "00-zz-\x7e"
    for parent in (not_sampled, nonsense):
        with Client(daemon.target, metadata={"traceparent": parent}) as client:
            client.encode(LATENTS)
    assert daemon.stop(signal.SIGTERM)[0] == 0
    # What is no trace begins one of its own.
    [served] = collector.named(ENCODE)
    assert not served.parent_span_id


def test_a_collector_that_is_not_there_holds_up_nothing(vqserved: Callable[..., Any], folder: Path) -> None:
    endpoint = "http://127.0.0.1:9/v1/traces"
    daemon = vqserved(folder, "--device", "cpu", "--trace-endpoint", endpoint, "--trace-ratio", "1")
    with Client(daemon.target) as client:
        for _ in range(20):
            client.encode(LATENTS)
    code, log = daemon.stop(signal.SIGTERM)
    assert code == 0
    assert "served requests=20" in log


def test_a_collector_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_EXPORT_S", 1000.0)
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        endpoint = f"http://127.0.0.1:{hanging.getsockname()[1]}/v1/traces"
        made = tracing.Tracing(TracesConfig(trace_endpoint=endpoint, trace_ratio=1.0))
        call = made.begin(SimpleNamespace(method=f"/{ENCODE}", metadata=[], request_id="id"))
        assert call is not None
        call.answered(None, codebook="book", rows=1, received_at=time.monotonic())
        closing = threading.Thread(target=made.close, daemon=True)
        closing.start()
        eventually(lambda: not closing.is_alive(), seconds=30)


@pytest.mark.parametrize(
    "metadata",
    [
        [("traceparent", "x" * 600)],
        [("traceparent", f"00-{'1' * 32}-{'2' * 16}-01"), ("tracestate", "no member, a=1, a=2")],
    ],
)
def test_what_callers_send_fills_no_log(
    vqserved: Callable[..., Any], folder: Path, collector: Collector, metadata: list[tuple[str, str]]
) -> None:
    daemon = vqserved(folder, "--device", "cpu", "--trace-endpoint", collector.url)
    with grpc.insecure_channel(daemon.target) as channel:
        encode: Any = channel.unary_unary(f"/{ENCODE}")
        with pytest.raises(grpc.RpcError):
            encode(b"", metadata=metadata, timeout=60)
    code, log = daemon.stop(signal.SIGTERM)
    assert code == 0
    assert " WARNING " not in log


def test_without_its_packages_the_daemon_names_the_command(folder: Path) -> None:
    program = (
        "import sys\n"
        "sys.modules['opentelemetry'] = None\n"
        "from vqserve_tools.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    options = ("--port", "0", "--metrics-port", "0", "--device", "cpu", "--trace-endpoint", "http://127.0.0.1:9")
    ended = subprocess.run(
        [sys.executable, "-c", program, "serve", str(folder), *options],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 1
    assert "opentelemetry is not installed: pip install 'vqserve[trace]'" in ended.stderr


def test_a_process_that_does_not_trace_sends_nothing(vqserved: Callable[..., Any], folder: Path) -> None:
    daemon = vqserved(folder, "--device", "cpu")
    program = (
        "import sys, numpy\n"
        "from vqserve_client import Client\n"
        "with Client(sys.argv[1]) as client: client.encode(numpy.zeros((1, 2, 4), 'f4'))\n"
        "print(any(name.startswith('opentelemetry') for name in sys.modules))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, daemon.target], capture_output=True, text=True, timeout=200, check=True
    )
    assert ended.stdout == "False\n"
