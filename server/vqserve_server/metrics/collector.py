"""Adds up what the processes of a server have counted, and writes it in Prometheus's formats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.openmetrics import exposition as openmetrics

from vqserve_server.metrics.families import FAMILIES, PREFIX, Family
from vqserve_server.metrics.store import Labels, Reader

_OPENMETRICS = "application/openmetrics-text"

# A name in FAMILIES, labels, value.
Sample = tuple[str, Mapping[str, str], float]


class Collector:
    """The metrics of one server, for `prometheus_client`."""

    def __init__(self, memories: Sequence[memoryview], present: Callable[[], Iterable[Sample]]) -> None:
        """Read nothing yet.

        Args:
            memories: what each process counts in with a `Store`, by its number.
            present: returns what only the process itself knows, at the time of the call.
        """
        self._readers = [Reader(memory) for memory in memories]
        self._present = present
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Return all metrics in the format that a request accepts, and its content type.

        Args:
            accept: the header of the request: OpenMetrics, or Prometheus's text for all else.
        """
        if _OPENMETRICS in accept:
            return openmetrics.generate_latest(self._registry), openmetrics.CONTENT_TYPE_LATEST  # type: ignore[no-untyped-call]
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4

    def reset_gauges(self, number: int) -> None:
        """Set to 0 what a worker that has ended had at the moment."""
        reader = self._readers[number]
        for series in reader.series():
            if series.name in FAMILIES and FAMILIES[series.name].kind == "gauge":
                reader.cells[series.start] = 0.0

    def collect(self) -> Iterator[Metric]:
        """Yield all families, each with its series."""
        series = self._sums()
        # What is counted in a histogram is not counted again.
        for key, values in series["request_seconds"].items():
            series["requests"][*key, "OK"] = [sum(values[:-1])]
        for key, values in series["batch_rows"].items():
            series["rows"][key] = [values[-1]]
        for name, labels, value in self._present():
            series[name][tuple(labels[label] for label in FAMILIES[name].labels)] = [value]
        for family in FAMILIES.values():
            yield _metric(family, series[family.name])

    def _sums(self) -> dict[str, dict[tuple[str, ...], list[float]]]:
        """Return the values of all series, by family and the values of its labels."""
        sums: dict[str, dict[tuple[str, ...], list[float]]] = {name: {} for name in FAMILIES}
        for number, reader in enumerate(self._readers):
            for each in list(reader.series()):
                family = FAMILIES.get(each.name)
                values = reader.values(each)
                # A worker may be another version than its parent, after an upgrade.
                if family is None or len(values) != family.num_cells:
                    continue
                key = _key(family, each.labels, number)
                if key is None:
                    continue
                known = sums[each.name].get(key)
                if known is None:
                    sums[each.name][key] = values
                elif family.kind == "gauge":
                    # What has no label of the worker is the same in all of them.
                    sums[each.name][key] = [max(known[0], values[0])]
                else:
                    sums[each.name][key] = [a + b for a, b in zip(known, values, strict=True)]
        return sums


def _key(family: Family, labels: Labels, number: int) -> tuple[str, ...] | None:
    values = {**dict(labels), "worker": str(number)}
    if any(label not in values for label in family.labels):
        return None
    return tuple(values[label] for label in family.labels)


def _metric(family: Family, series: Mapping[tuple[str, ...], list[float]]) -> Metric:
    name, labels = PREFIX + family.name, family.labels
    if family.kind == "counter":
        counter = CounterMetricFamily(name, family.help, labels=labels)
        for key, [value] in series.items():
            counter.add_metric(key, value)
        return counter
    if family.kind == "gauge":
        gauge = GaugeMetricFamily(name, family.help, labels=labels)
        for key, [value] in series.items():
            # What is 1 while something exists is left out when it no longer does.
            if value or not family.name.endswith("_info"):
                gauge.add_metric(key, value)
        return gauge
    histogram = HistogramMetricFamily(name, family.help, labels=labels)
    bounds = [*(repr(float(bound)) for bound in family.buckets), "+Inf"]
    for key, values in series.items():
        buckets = list(zip(bounds, accumulate(values[:-1]), strict=True))
        histogram.add_metric(key, buckets, sum_value=values[-1])
    return histogram
