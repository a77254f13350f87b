"""The table of all metrics, and its page."""

from __future__ import annotations

import re
from pathlib import Path

from vqserve_server.metrics.families import FAMILIES, PREFIX, metrics_table

DOCS = Path(__file__).resolve().parents[3] / "docs" / "metrics.md"


def test_the_documented_table_is_the_metrics() -> None:
    # To mend it: python -c "from vqserve_server.metrics.families import metrics_table; print(metrics_table())"
    assert metrics_table() in DOCS.read_text(encoding="utf-8")


def test_a_metric_on_the_page_exists() -> None:
    known = {name for family in FAMILIES.values() for name in (PREFIX + family.name, family.full_name)}
    named = re.findall(rf"\b{PREFIX}\w+", DOCS.read_text(encoding="utf-8"))
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in named} <= known


def test_names_follow_prometheus_s_conventions() -> None:
    for family in FAMILIES.values():
        assert re.fullmatch(r"[a-z][a-z_]*[a-z]", family.name)
        assert not family.name.endswith(("_total", "_bucket", "_count", "_sum", "_ms", "_us"))
        assert list(family.buckets) == sorted(set(family.buckets))
        assert bool(family.buckets) == (family.kind == "histogram")
        assert family.help.endswith(".") or ";" in family.help
