"""What a reader sees."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from vqserve.codebook_info import CodebookInfo
from vqserve_bench import ClosedLoop, OpenLoop, Schedule
from vqserve_bench.plot import draw_latency, time_spent
from vqserve_bench.report import report, to_json
from vqserve_bench.served import Served
from vqserve_bench.table import Table, number
from vqserve_bench.trial import Trial

INFO = CodebookInfo(
    name="x", digest="0" * 64, kind="vq", num_codes=1, vocab_size=1, input_dim=1, code_dim=1, output_dim=1
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "-"),
        (0.0, "0.000"),
        (0.12345, "0.123"),
        (12.345, "12.35"),
        (123.45, "123.5"),
        (1234.5, "1234"),
        (99_949.0, "99949"),
        (99_951.0, "99.95k"),
        (664_883.0, "664.9k"),
        (12_345_678.0, "12346k"),
        (123_456_789.0, "123.5M"),
        (5e12, "5000G"),
    ],
)
def test_numbers_are_short(value, expected):
    assert number(value) == expected
    assert len(expected) <= 6


@pytest.fixture
def measured(window):
    """Make a measurement of a load from its windows."""

    def make(load, *windows):
        trial = Trial(load, Schedule(max_windows=max(1, len(windows))))
        for one in (window(), *windows):
            trial.add(one)
        return trial.measurement()

    return make


def test_columns(measured, window):
    loads = ClosedLoop(8), OpenLoop(500.0)
    served = Served(4, 1000, 2000, 4000, 2.0, 64.0)
    good = measured(loads[0], *[window(0.01, tokens=32, bytes=1000, served=served)] * 3)
    poor = measured(loads[1], window(errors=Counter(A=2, B=1), dropped=7, busy_s=0.95))
    table = Table(loads)
    titles, names = table.heads().splitlines()
    first, second = table.row(good), table.row(poor)
    assert names.split() == [
        *("load", "requests/s", "tokens/s", "MB/s"),
        *("avg", "p50", "p90", "p95", "p99"),
        *("queue", "compute", "total", "requests", "rows", "errors"),
    ]
    assert re.findall(r"-+ ([a-z ]+) -+", titles) == ["latency ms", "server ms", "batch"]
    assert first.split() == [
        *("concurrency", "8", "1.000", "32.00", "0.001", "10.00", "10.00", "10.00", "10.00", "10.00"),
        *("0.250", "0.500", "1.000", "2.000", "32.00", "0"),
    ]
    assert second.startswith("rate 500/s ")
    assert second.endswith("       3  not stable, 7 dropped, generator busy 95%")
    # Numbers stand under the ends of their names.
    assert len(first) == len(names) == second.index("  not stable")


def test_json_has_no_numbers_that_json_has_not(measured, window):
    nothing = measured(ClosedLoop(1))
    some = measured(ClosedLoop(1), window())
    text = to_json(report([nothing, some], target="t", codebook=INFO, settings={"seed": 0}, began="now"))
    loads = json.loads(text, parse_constant=pytest.fail)["loads"]
    assert loads[0]["requests_per_s"] is None
    assert (loads[1]["requests_per_s"], loads[1]["latency_ms"], loads[1]["server"]) == (0.0, None, None)


def test_where_the_time_goes(measured, window):
    served = Served(1, 1000, 2000, 4000, 1.0, 1.0)
    spent = time_spent(measured(ClosedLoop(1), window(0.01, served=served)))
    assert list(spent.values()) == pytest.approx([1.0, 2.0, 1.0, 6.0])
    assert time_spent(measured(ClosedLoop(1), window(0.01))) == {"outside the server": 10.0}
    assert time_spent(measured(ClosedLoop(1), window())) == {}


def test_points_and_labels_are_inside_the_plot(measured, window):
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.subplots()
    latencies = {1: (0.004,) * 30, 8: (0.02,) * 31, 32: (0.3,) * 36}
    draw_latency(axes, [measured(ClosedLoop(n), *[window(*of)] * 3) for n, of in latencies.items()])
    FigureCanvasAgg(figure).draw()
    frame = axes.get_window_extent()
    for label in axes.texts:
        box = label.get_window_extent()
        assert frame.x0 <= box.x0
        assert box.x1 <= frame.x1
        assert box.y1 <= frame.y1
    for line in axes.lines:
        assert (axes.transData.transform(line.get_xydata())[:, 0] < frame.x1 - 5).all()
