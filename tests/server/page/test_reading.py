"""What the page computes from two expositions, against Prometheus's own client and plain arithmetic."""

from __future__ import annotations

import math

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

PARSE = """async (text) => {
  const { parse } = await import("/page/exposition.js");
  return [...parse(text)].map(([name, samples]) => [name, [...samples.values()].map(
    ({ labels, value }) => [Object.entries(labels), String(value)])]);
}"""
COMPUTE = """async ([before, now, expression]) => {
  const { parse } = await import("/page/exposition.js");
  const { Scrapes } = await import("/page/scrapes.js");
  const scrapes = new Scrapes(parse(now), before === null ? null : parse(before), 10);
  const functions = {
    rate: (name, where) => scrapes.rate(name, where),
    quantile: (name, q) => scrapes.histogram(name).quantile(q),
    mean: (name) => scrapes.histogram(name).mean,
  };
  const [what, ...rest] = expression;
  return functions[what](...rest);
}"""
LABELS = ["plain", "", 'quote " and } and ,x="y"', "back\\slash\\n", "line\nbreak", "名前", "{__proto__}", "a" * 1000]


@pytest.fixture
def page(open_console):
    return open_console().page


def number(text):
    return {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}.get(text) or float(text)


def test_it_reads_what_the_client_of_prometheus_writes(page):
    registry = CollectorRegistry()
    requests = Counter("vqserve_requests", "Help with \\ and\nlines.", ["codebook", "operation"], registry=registry)
    depth = Gauge("vqserve_depth", "x", ["worker"], registry=registry)
    times = Histogram("vqserve_seconds", "x", ["codebook"], registry=registry)
    for i, label in enumerate(LABELS):
        requests.labels(label, "encode").inc(i + 0.5)
        times.labels(label).observe(0.1 * i)
    for value in (math.inf, -math.inf, 1e-300, 1e300, 0.1 + 0.2, -5):
        depth.labels(str(value)).set(value)
    text = generate_latest(registry).decode()
    expected = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            expected.setdefault(sample.name, []).append((sample.labels, sample.value))
    read = {
        name: [(dict(labels), number(value)) for labels, value in samples]
        for name, samples in page.evaluate(PARSE, text)
    }
    assert read == expected


@pytest.mark.parametrize("text", ["<html>", "vqserve_x", "vqserve_x{a=1 2", "{}"])
def test_what_is_no_exposition_is_an_error(page, text):
    with pytest.raises(Exception, match="/metrics has a line that is no sample"):
        page.evaluate(PARSE, text)


def test_rates(page):
    before = 'vqserve_n_total{a="x",b="1"} 100\nvqserve_n_total{a="x",b="2"} 50\nvqserve_n_total{a="y",b="1"} 7\n'
    # One has grown, one began again, one is new.
    now = 'vqserve_n_total{a="x",b="1"} 130\nvqserve_n_total{a="x",b="2"} 20\nvqserve_n_total{a="z",b="1"} 5\n'
    assert page.evaluate(COMPUTE, [before, now, ["rate", "n_total", {}]]) == 5.5
    assert page.evaluate(COMPUTE, [before, now, ["rate", "n_total", {"a": "x"}]]) == 5
    assert page.evaluate(COMPUTE, [before, now, ["rate", "n_total", {"a": "x", "b": "1"}]]) == 3
    assert page.evaluate(COMPUTE, [before, now, ["rate", "other_total", {}]]) == 0
    assert page.evaluate(COMPUTE, [None, now, ["rate", "n_total", {}]]) is None


def exposition(cumulative, total):
    lines = [f'vqserve_s_bucket{{le="{le}"}} {count}' for le, count in cumulative.items()]
    return "\n".join([*lines, f"vqserve_s_sum {total}", f"vqserve_s_count {cumulative['+Inf']}"])


@pytest.mark.parametrize(
    ("cumulative", "q", "expected"),
    [
        ({"1": 10, "2": 20, "+Inf": 20}, 0.5, 1.0),
        ({"1": 10, "2": 20, "+Inf": 20}, 0.75, 1.5),
        ({"1": 0, "2": 0, "4": 8, "+Inf": 8}, 0.5, 3.0),
        ({"1": 0, "2": 0, "4": 8, "+Inf": 8}, 0.0001, 2.0),
        # Above the last bound nothing more is known.
        ({"1": 1, "2": 1, "+Inf": 100}, 0.99, 2.0),
        ({"1": 0, "2": 0, "+Inf": 0}, 0.5, None),
    ],
)
def test_quantiles(page, cumulative, q, expected):
    found = page.evaluate(COMPUTE, ["", exposition(cumulative, 1), ["quantile", "s", q]])
    assert found == (None if expected is None else pytest.approx(expected, rel=1e-3))


def test_only_what_is_new_counts(page):
    before, now = exposition({"1": 1000, "+Inf": 1000}, 500), exposition({"1": 1000, "+Inf": 1004}, 520)
    assert page.evaluate(COMPUTE, [before, now, ["mean", "s"]]) == 5
    assert page.evaluate(COMPUTE, [before, now, ["quantile", "s", 0.01]]) == 1
