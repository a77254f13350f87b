"""Every query of the dashboard and every alert, on a Prometheus that scraped two workers under load, each killed."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.certificates import Authority, Folder, free_port
from support.waiting import eventually
from support.workers import children
from vqserve.errors import InvalidArgument, VqserveError
from vqserve_client import Client, Tls

DIM, ROWS = 4, 64


class Callers:
    """Threads, each with a connection of its own and without retries, that count what they were answered."""

    def __init__(self, target: str, ca: Path, threads: int = 8) -> None:
        self._target, self._ca = target, ca
        self._pool = ThreadPoolExecutor(threads)
        self._threads = threads
        self._latents = np.random.default_rng(0).standard_normal((ROWS, DIM), dtype=np.float32)
        self._lock = threading.Lock()
        self.answered: Counter[str] = Counter()
        self.lost = 0

    def run(self, until: Callable[[], object]) -> None:
        """Encode and decode until something is true; return when all calls have ended."""
        stopped = threading.Event()
        runs = [self._pool.submit(self._call, stopped) for _ in range(self._threads)]
        try:
            eventually(until)
        finally:
            stopped.set()
            for run in runs:
                run.result()

    def _call(self, stopped: threading.Event) -> None:
        with Client(self._target, retries=0, tls=Tls(ca=self._ca)) as client:
            while not stopped.is_set():
                try:
                    indices = client.encode(self._latents)
                    with self._lock:
                        self.answered["encode"] += 1
                    client.decode(indices)
                    with self._lock:
                        self.answered["decode"] += 1
                except VqserveError:
                    with self._lock:
                        self.lost += 1

    @property
    def total(self) -> int:
        """Calls that were answered."""
        return self.answered.total()

    def more(self, calls: int) -> Callable[[], bool]:
        """Return whether so many more calls were answered than now."""
        before = self.total
        return lambda: self.total >= before + calls


def queries(dashboard: dict[str, Any]) -> list[str]:
    """Return all expressions of a dashboard, with its variables as Grafana fills them in."""
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    annotations = [each["expr"] for each in dashboard["annotations"]["list"]]
    variables = [each["query"]["query"] for each in dashboard["templating"]["list"] if each["type"] == "query"]
    selectors = [re.fullmatch(r"label_values\((.*), (\w+)\)", query) for query in variables]
    found = [*targets, *annotations, *(f"count by ({match[2]}) ({match[1]})" for match in selectors if match)]
    assert len(found) == len(targets) + len(annotations) + len(variables) > 30
    filled = {"$job": "vqserve", "$instance": ".*", "$codebook": ".*", "$__rate_interval": "1m"}
    for variable, value in filled.items():
        found = [expression.replace(variable, value) for expression in found]
    assert not any("$" in expression for expression in found)
    return found


def encode_until_sampled(client: Client, monitor: Any, rows: int, *, shift: float = 0.0) -> None:
    """Encode until so many more rows are sampled, and the figures are of them."""
    rng = np.random.default_rng(1)
    sampled = partial(monitor.value, "vqserve_codebook_sampled_rows_total")
    until = sampled() + rows
    while sampled() < until:
        client.encode(rng.standard_normal((100_000, DIM), dtype=np.float32) + np.float32(shift))


@pytest.fixture
def book(put: Callable[..., Any], run_vqserved: Callable[..., Any], tmp_path: Path) -> Path:
    """A codebook whose file has the statistics of normal latents."""
    path, latents = tmp_path / "books" / "faces.safetensors", tmp_path / "latents.npy"
    put(path, dim=DIM, num_codes=64)
    np.save(latents, np.random.default_rng(0).standard_normal((200_000, DIM), dtype=np.float32))
    saved = run_vqserved("inspect", path, "--latents", latents, "--save-stats")
    assert saved.returncode == 0, saved.stderr
    return path


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_workers_under_load_that_are_killed(
    vqserved: Callable[..., Any],
    book: Path,
    prometheus: Callable[[int], Any],
    dashboard: dict[str, Any],
    rules: dict[str, dict[str, Any]],
    tmp_path: Path,
) -> None:
    authority, folder = Authority(), Folder(tmp_path)
    folder.put(authority.issue(days=3))
    ca = tmp_path / "ca.pem"
    ca.write_bytes(authority.pem)
    metrics_port = free_port()
    daemon = vqserved(
        book,
        *("--workers", 2, "--tls-cert", folder.cert, "--tls-key", folder.key),
        VQSERVE_METRICS_PORT=str(metrics_port),
    )
    monitor = prometheus(metrics_port)

    def counted(name: str, **labels: str) -> float:
        where = ",".join(f'{label}="{value}"' for label, value in labels.items())
        return monitor.value(f"sum({name}{{{where}}})")

    def agree(callers: Callers) -> None:
        """What Prometheus has is what the callers have counted, in every metric that counts requests."""
        monitor.next_scrape()
        for operation in ("encode", "decode"):
            where, calls = {"operation": operation}, callers.answered[operation]
            assert counted("vqserve_requests_total", **where, status="OK") == calls
            assert counted("vqserve_tokens_total", **where) == calls * ROWS
            assert counted("vqserve_request_seconds_count", **where) == calls
            assert counted("vqserve_request_seconds_bucket", **where, le="+Inf") == calls
            assert counted("vqserve_queue_seconds_count", **where) == calls
            assert counted("vqserve_batch_requests_sum", **where) == calls
            assert counted("vqserve_batch_rows_sum", **where) == counted("vqserve_rows_total", **where) == calls * ROWS

    callers = Callers(daemon.target, ca)
    callers.run(callers.more(500))
    assert callers.lost == 0
    agree(callers)

    # One worker is killed while nobody calls: nothing that was counted is lost.
    victim = children(daemon.process.pid)[0]
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: monitor.value("vqserve_worker_restarts_total") == 1)
    eventually(lambda: monitor.value("vqserve_workers_ready") == 2)
    agree(callers)

    # The other one is killed under load: only the calls that it had are in doubt.
    before = Counter(callers.answered)
    victim = children(daemon.process.pid)[1]

    def killed_and_back() -> bool:
        return monitor.value("vqserve_worker_restarts_total") == 2 and monitor.value("vqserve_workers_ready") == 2

    enough = callers.more(500)
    threading.Timer(0.5, os.kill, (victim, signal.SIGKILL)).start()
    callers.run(lambda: enough() and killed_and_back())
    monitor.next_scrape()
    for operation in ("encode", "decode"):
        server = counted("vqserve_requests_total", operation=operation, status="OK")
        assert callers.answered[operation] <= server <= callers.answered[operation] + callers.lost
        assert callers.answered[operation] > before[operation]

    counters = monitor.query('count by (__name__) ({__name__=~"vqserve_.*(_total|_bucket|_count|_sum)"})')
    assert len(counters) > 20
    assert [name for labels, _ in counters if monitor.query(f"resets({(name := labels['__name__'])}[1h]) > 0")] == []

    daemon.rescan(workers=2)
    with Client(daemon.target, tls=Tls(ca=ca)) as client:
        with pytest.raises(InvalidArgument):
            client.encode(np.full((1, DIM), np.nan, np.float32))
        encode_until_sampled(client, monitor, 3000)
    # A rate needs two scrapes.
    monitor.next_scrape()

    empty = [expression for expression in queries(dashboard) if not monitor.query(expression)]
    # What needs an event that there was none of, or a GPU.
    known = ("vqserve_expired_total", "vqserve_refused_total", "vqserve_device_memory_bytes", "changes(")
    assert [expression for expression in empty if not any(name in expression for name in known)] == []

    firing = {name for name, rule in rules.items() if monitor.query(rule["expr"])}
    assert firing >= {"VqserveWorkerRestarts", "VqserveCertificateExpires"}
    assert not firing & {
        "VqserveDown",
        "VqserveNoWorker",
        "VqserveNotServing",
        "VqserveRefusals",
        "VqserveReloadFailed",
    }
    eventually(lambda: monitor.query('ALERTS{alertname="VqserveWorkerRestarts", alertstate="firing"}'))

    daemon.stop(signal.SIGTERM)
    eventually(lambda: monitor.query(rules["VqserveDown"]["expr"]))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_drift_alarm_fires_on_other_latents_only(
    vqserved: Callable[..., Any],
    book: Path,
    prometheus: Callable[[int], Any],
    rules: dict[str, dict[str, Any]],
) -> None:
    """Latents of the distribution that the file's statistics are of, then others."""
    metrics_port = free_port()
    daemon = vqserved(book, "--workers", 2, VQSERVE_METRICS_PORT=str(metrics_port))
    monitor = prometheus(metrics_port)
    alarms = {name: rules[name]["expr"] for name in ("VqserveCodebookDrift", "VqserveCodebookError")}
    with Client(daemon.target) as client:
        encode_until_sampled(client, monitor, 8000)
        assert monitor.value("vqserve_codebook_drift_bits") < 0.02
        assert 0.9 < monitor.value("vqserve_codebook_error_ratio") < 1.1
        assert [name for name, expression in alarms.items() if monitor.query(expression)] == []
        encode_until_sampled(client, monitor, 8000, shift=1.5)
        assert monitor.value("vqserve_codebook_drift_bits") > 0.1
        assert [name for name, expression in alarms.items() if monitor.query(expression)] == list(alarms)
