"""What several processes have counted, added up and written in Prometheus's formats."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from support.certificates import Authority, Folder
from vqserve_server.access import Access
from vqserve_server.config import resolve
from vqserve_server.metrics.collector import Collector
from vqserve_server.metrics.families import FAMILIES
from vqserve_server.metrics.memory import private_part
from vqserve_server.metrics.present import Present, Processes
from vqserve_server.metrics.recorder import Metrics
from vqserve_server.metrics.store import Store

NBYTES = 1 << 16


class Ended:
    """A request of 5 tokens that ends."""

    is_counted = False
    rows = 5
    message_bytes = 100


def samples(collector: Collector, accept: str = "") -> dict[tuple[str, ...], float]:
    """Return the values of all samples by their names and the values of their labels, in the order of these."""
    text, _ = collector.exposition(accept)
    parse = openmetrics.text_string_to_metric_families if accept else text_string_to_metric_families
    found: Iterable[Sample] = (sample for family in parse(text.decode()) for sample in family.samples)
    return {
        (each.name.removeprefix("vqserve_"), *(value for _, value in sorted(each.labels.items()))): each.value
        for each in found
    }


@pytest.fixture
def memories() -> list[memoryview]:
    return [private_part(NBYTES) for _ in range(3)]


@pytest.fixture
def collector(memories: list[memoryview]) -> Collector:
    return Collector(memories, tuple)


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
def test_counters_and_histograms_are_added_up_and_gauges_are_not(
    collector: Collector, memories: list[memoryview], accept: str
) -> None:
    assert samples(collector, accept) == {}
    for number, memory in enumerate(memories):
        metrics = Metrics(memory)
        for _ in range(number):
            metrics.operation("book", "encode").answered(Ended(), 0.002, 0.0002, 40)
        metrics.operation("book", "encode").computed(number + 1, 5, 0.001)
        metrics.add("refused", 2, reason="bytes")
        metrics.set("queue_rows", 10 * number)
    found = samples(collector, accept)
    assert found["requests_total", "book", "encode", "OK"] == 3
    assert found["tokens_total", "book", "encode"] == 15
    assert found["request_bytes_total", "book", "encode"] == 300
    assert found["reply_bytes_total", "book", "encode"] == 120
    assert found["rows_total", "book", "encode"] == 15
    assert found["refused_total", "bytes"] == 6
    assert found["request_seconds_count", "book", "encode"] == 3
    assert found["request_seconds_sum", "book", "encode"] == pytest.approx(0.006)
    # A value that equals a bound is within it, and buckets are cumulative.
    assert found["request_seconds_bucket", "book", "0.001", "encode"] == 0
    assert found["request_seconds_bucket", "book", "0.0025", "encode"] == 3
    assert found["compute_seconds_bucket", "book", "0.001", "encode"] == 3
    assert [found["batch_requests_bucket", "book", le, "encode"] for le in ("1.0", "2.0", "4.0", "+Inf")] == [
        1,
        2,
        3,
        3,
    ]
    assert [found["queue_rows", str(number)] for number in range(3)] == [0, 10, 20]


def test_a_request_is_counted_once() -> None:
    memory = private_part(NBYTES)
    collector, encode = Collector([memory], tuple), Metrics(memory).operation("book", "encode")
    request = Ended()
    encode.answered(request, 0.1, 0.0, 1)
    encode.failed_once(request, "CANCELLED")
    encode.answered(request, 0.1, 0.0, 1)
    other = Ended()
    encode.failed_once(other, "CANCELLED")
    encode.answered(other, 0.1, 0.0, 1)
    found = samples(collector)
    assert found["requests_total", "book", "encode", "OK"] == 1
    assert found["requests_total", "book", "encode", "CANCELLED"] == 1
    assert found["request_bytes_total", "book", "encode"] == 200


def test_a_worker_that_has_ended_keeps_what_it_counted(collector: Collector, memories: list[memoryview]) -> None:
    book = dict.fromkeys(FAMILIES["codebook_info"].labels, "x")
    for memory in memories[:2]:
        metrics = Metrics(memory)
        metrics.add("refused", reason="rows")
        metrics.set("queue_rows", 7)
        metrics.publish([book])
    assert samples(collector)["codebook_info", *["x"] * len(book)] == 1
    collector.reset_gauges(0)
    found = samples(collector)
    assert (found["queue_rows", "0"], found["queue_rows", "1"]) == (0, 7)
    assert found["refused_total", "rows"] == 2
    # The other one has the codebook.
    assert found["codebook_info", *["x"] * len(book)] == 1
    collector.reset_gauges(1)
    assert ("codebook_info", *["x"] * len(book)) not in samples(collector)


@pytest.mark.parametrize("name", ['"', "\\", "a\nb", '",status="OK"} 9\n', "ä/ö 漢@3", "# HELP", " ", "{}", "a" * 300])
def test_any_name_of_a_codebook_can_be_read_back(name: str) -> None:
    memory = private_part(NBYTES)
    Metrics(memory).operation(name, "encode").answered(Ended(), 0.1, 0.0, 1)
    for accept in ("", "application/openmetrics-text"):
        assert samples(Collector([memory], tuple), accept)["requests_total", name, "encode", "OK"] == 1


def test_what_another_version_writes_is_left_out(collector: Collector, memories: list[memoryview]) -> None:
    store = Store(memories[0])
    store.cells[store.cell("of_tomorrow", x="1")] = 1
    store.cells[store.cell("request_seconds", 3, codebook="book", operation="encode")] = 1
    store.cells[store.cell("refused", other="label")] = 1
    assert samples(collector) == {}


def test_every_family_has_help_and_a_type_even_without_samples(collector: Collector) -> None:
    text = collector.exposition("")[0].decode()
    for family in FAMILIES.values():
        assert f"# HELP {family.full_name} {family.help}\n" in text
        assert f"# TYPE {family.full_name} {family.kind}\n" in text


def test_a_certificate_that_is_replaced_has_another_end(tmp_path: Path) -> None:
    authority, folder = Authority(), Folder(tmp_path)
    folder.put(authority.issue(days=10))
    config = resolve({}, {f"VQSERVE_{name.upper()}": value for name, value in folder.settings().items()})
    collector = Collector([], Present(config, Access(config.access), Processes()))
    for days in (10, 20):
        folder.put(authority.issue(days=days))
        expires = datetime.fromtimestamp(samples(collector)["certificate_expiry_timestamp_seconds", "tls_cert"], UTC)
        assert abs(expires - datetime.now(UTC) - timedelta(days=days)) < timedelta(hours=1)
