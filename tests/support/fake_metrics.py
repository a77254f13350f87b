"""A server's metrics port with invented contents: /metrics and /codebooks.json say what a test wants."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from vqserve_server.metrics.http import HttpServer, Problem, Request, Response
from vqserve_server.monitoring.port import page_routes
from vqserve_server.network import listen

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
ROWS = tuple(float(4**power) for power in range(10))
Key = tuple[str, tuple[tuple[str, str], ...]]


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


@dataclass
class FakeMetrics:
    """Samples that are written as Prometheus's text; names without "vqserve_"."""

    samples: dict[Key, float] = field(default_factory=dict)
    health: list[dict[str, Any]] = field(default_factory=list)
    # Each request of these paths is answered with this status.
    failing: dict[str, int] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    # Answers wait for it.
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        """Let answers pass."""
        self.gate.set()

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a sample."""
        with self.lock:
            self.samples[name, tuple(labels.items())] = value

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Add to a sample."""
        with self.lock:
            key = (name, tuple(labels.items()))
            self.samples[key] = self.samples.get(key, 0.0) + value

    def observe(
        self, name: str, value: float, buckets: tuple[float, ...] = SECONDS, count: int = 1, **labels: str
    ) -> None:
        """Add to a histogram."""
        for bound in buckets:
            self.add(f"{name}_bucket", count * (value <= bound), **labels, le=f"{bound:g}")
        self.add(f"{name}_bucket", count, **labels, le="+Inf")
        self.add(f"{name}_sum", count * value, **labels)
        self.add(f"{name}_count", count, **labels)

    def text(self) -> str:
        """Return the exposition."""
        with self.lock:
            samples = dict(self.samples)
        lines = []
        for (name, labels), value in samples.items():
            written = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels)
            lines.append(f"vqserve_{name}{{{written}}} {value!r}" if written else f"vqserve_{name} {value!r}")
        return "# HELP vqserve_x y\n" + "\n".join(lines) + "\n"

    def serve_two_workers(self, names: Mapping[str, str]) -> None:
        """Set what a server with two workers says that has these codebooks: names and digests."""
        self.set("build_info", 1, version="0.9.0", python="3.11.7", torch="2.13.0", grpcio="1.85.1")
        self.set("start_time_seconds", 1_700_000_000.0)
        self.set("workers", 2)
        self.set("workers_ready", 2)
        for worker in ("0", "1"):
            self.set("serving", 1, worker=worker)
            for what, limit in (("requests", 1024), ("rows", 2**20), ("bytes", 2**30)):
                self.set(f"queue_{what}", limit / 4, worker=worker)
                self.set(f"queue_{what}_limit", limit, worker=worker)
            self.set("open_calls", 3, worker=worker)
            self.set("connections", 2, worker=worker)
            self.set("process_resident_bytes", 3 * 2**28, worker=worker)
            self.set("device_memory_bytes", 2**27, worker=worker, device="cpu")
            self.set("device_busy_seconds_total", 0, worker=worker, device="cpu")
        for name, digest in names.items():
            info = {"codebook": name, "digest": digest, "kind": "vq", "num_codes": "1024", "code_dim": "4"}
            self.set("codebook_info", 1, **info)

    def stage(self, usage: list[float], reference: list[float] | None = None, **changed: Any) -> dict[str, Any]:
        """Return a stage of /codebooks.json, one code for each share."""
        used = sum(share > 0 for share in usage)
        stage = {
            "codes": len(usage),
            "codes_per_group": 1,
            "sampled_rows": 100_000,
            "used": used,
            "dead": len(usage) - used,
            "perplexity": used * 0.8,
            "drift_bits": None if reference is None else 0.012,
            "usage": usage,
            "reference": reference,
        }
        return {**stage, **changed}

    def codebook(self, name: str, *stages: dict[str, Any], digest: str = "0" * 64, **changed: Any) -> None:
        """Add a codebook to /codebooks.json."""
        health = {
            "name": name,
            "digest": digest,
            "kind": "vq",
            "stages": list(stages),
            "error": 0.25,
            "error_ratio": 1.02,
        }
        self.health.append({**health, **changed})


@contextmanager
def serving_fake(metrics: FakeMetrics, port: int = 0) -> Iterator[str]:
    """Serve the console of invented metrics, as a server does; yield its URL."""

    def answer(request: Request) -> Response:
        metrics.requests.append(request.path)
        metrics.gate.wait()
        if request.path in metrics.failing:
            raise Problem(HTTPStatus(metrics.failing[request.path]), "as the test wants it")
        if request.path == "/metrics":
            return Response(metrics.text().encode(), "text/plain; version=0.0.4; charset=utf-8")
        return Response(json.dumps(metrics.health).encode(), "application/json")

    listener = listen("127.0.0.1", port, flag="--metrics-port")
    bound = listener.getsockname()[1]
    server = HttpServer({"/metrics": answer, "/codebooks.json": answer, **page_routes()}, listener)
    server.start()
    try:
        yield f"http://127.0.0.1:{bound}/"
    finally:
        server.close()
