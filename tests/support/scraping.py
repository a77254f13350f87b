"""Metrics as a monitoring system reads them: over HTTP, by the parser of prometheus_client."""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Iterable
from http import HTTPStatus

from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"


class Scrape:
    """All samples of one answer.

    Attributes:
        text: the answer.
        kinds: the kinds of the families, by their names.
    """

    def __init__(self, port: int, accept: str = "") -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics", headers={"Accept": accept})
            response = connection.getresponse()
            assert response.status == HTTPStatus.OK
            self.content_type = response.headers["Content-Type"]
            self.text = response.read().decode()
        parse = text_string_to_metric_families if accept == "" else openmetrics.text_string_to_metric_families
        families = list(parse(self.text))
        self.kinds = {family.name: family.type for family in families}
        self._samples = {
            (sample.name, *sorted(sample.labels.items())): (family.type, sample.value)
            for family in families
            for sample in family.samples
        }

    def __call__(self, name: str, /, **labels: str) -> float:
        """The sum of the samples of a name, without its prefix, that have all these labels."""
        return sum(
            value
            for (full_name, *found), (_, value) in self._samples.items()
            if full_name == f"vqserve_{name}" and labels.items() <= dict(found).items()
        )

    def labels(self, name: str, label: str) -> set[str]:
        """The values of a label of all samples of a name."""
        return {dict(found)[label] for full_name, *found in self._samples if full_name == f"vqserve_{name}"}

    def counters(self) -> Iterable[tuple[tuple[object, ...], float]]:
        """What may only grow: counters, and the counts and sums of histograms."""
        for key, (kind, value) in self._samples.items():
            if kind in {"counter", "histogram"}:
                yield key, value


def check_grows(before: Scrape, after: Scrape) -> None:
    """Fail if anything that may only grow has become less, or has gone."""
    later = dict(after.counters())
    shrunk = {key: (value, later.get(key)) for key, value in before.counters() if later.get(key, -1.0) < value}
    assert not shrunk
