"""The dashboard as a file: every panel has a place, a name and a meaning, and every metric is on one."""

from __future__ import annotations

import re
from typing import Any

from vqserve_server.metrics.families import FAMILIES

COLUMNS = 24


def test_every_panel_has_a_place_of_its_own(dashboard: dict[str, Any]) -> None:
    places: dict[tuple[int, int], str] = {}
    for panel in dashboard["panels"]:
        x, y, width, height = (panel["gridPos"][name] for name in "xywh")
        assert x >= 0
        assert x + width <= COLUMNS
        for cell in ((column, line) for column in range(x, x + width) for line in range(y, y + height)):
            assert cell not in places, (panel["title"], places.get(cell))
            places[cell] = panel["title"]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    # No holes, so that Grafana moves nothing.
    assert len(places) == COLUMNS * (1 + max(line for _, line in places))


def test_every_panel_says_what_it_shows(dashboard: dict[str, Any]) -> None:
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            continue
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        letters = [target["refId"] for target in panel["targets"]]
        assert len(letters) == len(set(letters)) > 0
        for query in (panel, *panel["targets"]):
            assert query["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        if len(panel["targets"]) > 1:
            assert all(target["legendFormat"] for target in panel["targets"])


def test_every_metric_is_on_a_panel_or_in_a_variable(dashboard: dict[str, Any]) -> None:
    assert [family.full_name for family in FAMILIES.values() if family.full_name not in str(dashboard)] == []


def test_every_query_is_of_metrics_that_exist(dashboard: dict[str, Any]) -> None:
    known = {f"{family.full_name}{end}" for family in FAMILIES.values() for end in ("", "_bucket", "_sum", "_count")}
    assert set(re.findall(r"\bvqserve_\w+", str(dashboard))) - known == set()
