"""Two workers under load, one of them killed: nothing that was counted is lost, and nothing shrinks."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from support.certificates import free_port
from support.faults import Faults
from support.scraping import OPENMETRICS, Scrape, check_grows
from support.waiting import eventually, read_until
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve.v1 import tokenizer_pb2_grpc
from vqserve_client import Client

ROWS = 5
ENCODE = pb.EncodeRequest(dtype=pb.DTYPE_FLOAT32, shape=[ROWS, 4], latents=bytes(16 * ROWS))
DECODE = pb.DecodeRequest(dtype=pb.DTYPE_UINT8, shape=[ROWS], indices=bytes(ROWS))
INVALID = pb.EncodeRequest(dtype=pb.DTYPE_FLOAT32, shape=[ROWS, 3], latents=bytes(12 * ROWS))


class Callers:
    """Threads that call without retries, each on connections of its own, and count the answers as they get them."""

    def __init__(self, target: str, threads: int = 4) -> None:
        self._target = target
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.counts: Counter[tuple[str, str]] = Counter()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def _run(self) -> None:
        while not self._stop.is_set():
            # Again and again new connections, so that each worker gets some.
            options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
            with grpc.insecure_channel(self._target, options=options) as channel:
                stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
                for _ in range(10):
                    self._call("encode", stub.Encode, ENCODE)
                    self._call("decode", stub.Decode, DECODE)
                    self._call("encode", stub.Encode, INVALID)

    def _call(self, operation: str, method: Any, request: Any) -> None:
        try:
            method(request, timeout=60)
            status = "OK"
        except grpc.RpcError as error:
            status = error.code().name
        with self._lock:
            self.counts[operation, status] += 1

    def answered(self) -> int:
        with self._lock:
            return sum(self.counts.values())

    def lost(self, operation: str) -> int:
        """How many got no answer of the server's own."""
        answers = {"OK", "INVALID_ARGUMENT"}
        return sum(n for (name, status), n in self.counts.items() if name == operation and status not in answers)

    def go_on(self) -> None:
        """Wait for several more answers."""
        enough = self.answered() + 200
        eventually(lambda: self.answered() >= enough)

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def pids_of(process: Any, workers: int) -> dict[int, int]:
    lines = [read_until(process.stderr, "worker_ready") for _ in range(workers)]
    fields = [dict(field.split("=") for field in line.split() if "=" in field) for line in lines]
    return {int(each["number"]): int(each["pid"]) for each in fields}


@pytest.mark.long
def test_sums_are_what_the_callers_counted_though_a_worker_is_killed(
    vqserved: Callable[..., Any], tmp_path: Path, tokenizer: Any
) -> None:
    del tokenizer
    port = free_port()
    book = tmp_path / "book.safetensors"
    daemon = vqserved(book, "--workers", 2, "--metrics-port", port, "--max-connection-age-seconds", 0)
    pids = pids_of(daemon.process, 2)
    with Callers(daemon.target) as callers:
        callers.go_on()
        # Both are called before one is killed.
        eventually(lambda: all(Scrape(port)("device_busy_seconds_total", worker=worker) > 0 for worker in "01"))
        before = Scrape(port)
        assert before("workers") == before("workers_ready") == 2
        os.kill(pids[0], signal.SIGKILL)
        while (found := Scrape(port))("worker_restarts_total") == 0 or found("workers_ready") < 2:
            check_grows(before, found)
            before = found
        callers.go_on()
        check_grows(before, Scrape(port))
    found = Scrape(port)
    check_grows(before, found)
    for operation in ("encode", "decode"):
        answered, failed = callers.counts[operation, "OK"], callers.lost(operation)
        # What the killed worker had counted and not yet sent has failed for its callers.
        counted = found("requests_total", operation=operation, codebook="book", status="OK")
        assert answered <= counted <= answered + failed
        assert found("tokens_total", operation=operation) == ROWS * counted
        assert found("request_seconds_count", operation=operation) == counted
        assert found("queue_seconds_count", operation=operation) == counted
        assert found("batch_rows_sum", operation=operation) == found("rows_total", operation=operation)
        # The server's own checks have rows, too.
        assert found("rows_total", operation=operation) >= counted * ROWS
    invalid = callers.counts["encode", "INVALID_ARGUMENT"]
    assert invalid <= found("requests_total", status="INVALID_ARGUMENT") <= invalid + callers.lost("encode")
    # A real restart, and no other.
    assert found("worker_restarts_total") == 1
    # The same numbers in both formats.
    other = Scrape(port, OPENMETRICS)
    assert other.content_type.startswith("application/openmetrics-text")
    assert other("requests_total") == found("requests_total")
    code, _ = daemon.stop(signal.SIGTERM)
    assert code == 0


def test_a_worker_that_has_ended_has_nothing_at_the_moment(
    vqserved: Callable[..., Any], tmp_path: Path, tokenizer: Any, faults: Faults
) -> None:
    del tokenizer
    port = free_port()
    daemon = vqserved(tmp_path / "book.safetensors", "--workers", 2, "--metrics-port", port, **faults.environ)
    pids = pids_of(daemon.process, 2)
    for worker in (0, 1):
        faults.put("slow", 30, worker=worker)
    with grpc.insecure_channel(daemon.target) as channel:
        call = tokenizer_pb2_grpc.TokenizerServiceStub(channel).Encode.future(ENCODE)
        eventually(lambda: Scrape(port)("queue_requests") == 1)
        for worker in (0, 1):
            faults.clear(worker)
        found = Scrape(port)
        assert found("serving") == 2
        assert found("open_calls") == 1
        assert found("connections") >= 1
        assert found("process_resident_bytes", worker="0") > 1 << 20
        [busy] = [worker for worker in (0, 1) if found("queue_requests", worker=str(worker))]
        os.kill(pids[busy], signal.SIGKILL)
        eventually(lambda: Scrape(port)("workers_ready") == 1)
        found = Scrape(port)
        assert found("serving", worker=str(busy)) == found("queue_requests") == found("connections") == 0
        assert found("serving", worker=str(1 - busy)) == 1
        assert call.code() is grpc.StatusCode.UNAVAILABLE
        # The others have the codebook.
        assert found("codebook_info", codebook="book") == 1
    eventually(lambda: Scrape(port)("workers_ready") == 2)
    code, _ = daemon.stop(signal.SIGTERM)
    assert code == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_the_port_answers_from_the_start_to_the_end(
    vqserved: Callable[..., Any], tmp_path: Path, tokenizer: Any, faults: Faults, workers: int
) -> None:
    del tokenizer
    port = free_port()
    arguments = (tmp_path / "book.safetensors", "--workers", workers, "--metrics-port", port)
    daemon = vqserved(*arguments, "--max-queue-requests", 2, **faults.environ)
    for worker in range(workers):
        faults.put("slow", 3, worker=worker)
    with grpc.insecure_channel(daemon.target) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        calls = [stub.Encode.future(ENCODE, timeout=100) for _ in range(6)]
        # Full.
        eventually(lambda: (found := Scrape(port))("refused_total") + found("queue_requests") == len(calls))
        refused = Scrape(port)("refused_total")
        assert refused >= 4
        assert Scrape(port)("queue_requests_limit", worker="0") == 2
        daemon.process.send_signal(signal.SIGTERM)
        # Drained.
        eventually(lambda: Scrape(port)("serving") == 0)
        assert Scrape(port)("requests_total", status="RESOURCE_EXHAUSTED") == refused
        answered = [call.exception() is None for call in calls]
        assert sum(answered) == len(calls) - refused
    assert daemon.process.wait() == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_reloads_are_counted(vqserved: Callable[..., Any], tmp_path: Path, tokenizer: Any, put: Any) -> None:
    port = free_port()
    daemon = vqserved(tmp_path / "book.safetensors", "--metrics-port", port)
    digest = {tokenizer.info.digest}
    assert Scrape(port).labels("codebook_info", "digest") == digest
    # An alert sees the first reload that fails only where a zero is before it.
    assert Scrape(port).labels("reloads_total", "result") == {"ok", "rejected", "failed"}
    other = put(tmp_path / "other.safetensors", seed=1)
    (tmp_path / "other.safetensors").replace(tmp_path / "book.safetensors")
    daemon.rescan()
    found = Scrape(port)
    assert found("reloads_total", result="ok") == 1
    assert found.labels("codebook_info", "digest") == {other.info.digest}
    (tmp_path / "book.safetensors").write_bytes(b"damaged")
    daemon.rescan()
    found = Scrape(port)
    assert (found("reloads_total", result="ok"), found("reloads_total", result="rejected")) == (1, 1)
    assert found.labels("codebook_info", "digest") == {other.info.digest}


def test_rows_that_the_fast_search_leaves_open_are_counted(
    vqserved: Callable[..., Any], tmp_path: Path, tokenizer: Any
) -> None:
    port = free_port()
    daemon = vqserved(tmp_path / "book.safetensors", "--metrics-port", port)
    before = Scrape(port)("rechecked_rows_total", codebook="book")
    codes = tokenizer.decode(np.arange(40))
    pairs = [(a, b) for a in range(40) for b in range(a)]
    a, b = min(pairs, key=lambda pair: np.linalg.norm(codes[pair[0]] - codes[pair[1]]))
    with Client(daemon.target) as client:
        client.encode((codes[[a]] + codes[[b]]) / 2)
    assert Scrape(port)("rechecked_rows_total", codebook="book") > before


def test_two_servers_on_one_machine_both_start(
    vqserved: Callable[..., Any], run_vqserved: Callable[..., Any], tmp_path: Path, tokenizer: Any
) -> None:
    del tokenizer
    book = tmp_path / "book.safetensors"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = run_vqserved("serve", book, "--port", 0, "--metrics-port", port)
        assert refused.returncode == 1
        assert refused.stderr.endswith("or choose another with --metrics-port\n")
        refused = run_vqserved("serve", book, "--port", 0, "--metrics-port", port, "--workers", 2)
        assert refused.returncode == 1
    first = vqserved(book, VQSERVE_METRICS_PORT="auto")
    second = vqserved(book, VQSERVE_METRICS_PORT="auto")
    # Another server of this machine may have the port, then neither of these has.
    assert "metrics_port_taken" in second.stop(signal.SIGTERM)[1]
    first.stop(signal.SIGTERM)


def test_versions_and_the_start_are_told(vqserved: Callable[..., Any], tmp_path: Path, tokenizer: Any) -> None:
    del tokenizer
    port = free_port()
    vqserved(tmp_path / "book.safetensors", "--metrics-port", port)
    found = Scrape(port)
    assert found("build_info") == 1
    assert found.labels("build_info", "grpcio") == {grpc.__version__}
    assert found("start_time_seconds") > 1.7e9
    assert found("workers") == found("workers_ready") == found("serving", worker="0") == 1
