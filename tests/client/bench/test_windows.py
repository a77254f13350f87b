"""Windows, when they agree, and what is made of them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest

from vqserve_bench import ClosedLoop, Latency, Schedule, Server
from vqserve_bench.schedule import agree
from vqserve_bench.served import Served
from vqserve_bench.trial import Trial
from vqserve_bench.window import one_after_the_other, side_by_side


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([100, 100, 100], True),
        ([95, 100, 105], True),
        ([90, 100, 110], True),
        ([89, 100, 111], False),
        ([1, 1, 2], False),
        ([math.nan, 1, 1], False),
    ],
)
def test_agreement_is_with_the_mean(values, expected):
    assert agree(values, 0.1) is expected


def windows(make, *of):
    """Windows of (requests, latency)."""
    return [make(*[latency] * requests) for requests, latency in of]


def test_stability_needs_the_last_three_in_both(window):
    schedule = Schedule(stability=0.1)
    assert not schedule.is_stable(windows(window, (9, 1.0), (9, 1.0)))
    assert schedule.is_stable(windows(window, (9, 1.0), (9, 1.0), (9, 1.0)))
    assert schedule.is_stable(windows(window, (1, 5.0), (9, 1.0), (9, 1.0), (9, 1.0)))
    assert not schedule.is_stable(windows(window, (9, 1.0), (9, 1.0), (9, 2.0)))
    assert not schedule.is_stable(windows(window, (9, 1.0), (9, 1.0), (5, 1.0)))
    assert not schedule.is_stable(windows(window, (0, 1.0), (0, 1.0), (0, 1.0)))


@pytest.mark.parametrize("wrong", [{"warmup_s": -1}, {"window_s": 0}, {"max_windows": 0}, {"stability": 0}])
def test_a_schedule_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="must be"):
        Schedule(**wrong)


def test_a_trial_ends_when_windows_agree(window):
    seen = []
    trial = Trial(ClosedLoop(1), Schedule(max_windows=9), seen.append)
    for one in windows(window, (50, 1.0), (1, 1.0), (9, 1.0), (9, 1.0)):
        assert trial.add(one)
    assert not trial.add(window(*[1.0] * 9))
    measured = trial.measurement()
    assert measured.stable
    # Neither the warm-up nor the window that did not agree.
    assert (measured.requests, measured.seconds, measured.requests_per_s) == (27, 3.0, 9.0)
    assert [one.requests for one in measured.windows] == [1, 9, 9, 9]
    assert len(seen) == 5


def test_a_trial_ends_when_it_must(window):
    trial = Trial(ClosedLoop(1), Schedule(max_windows=4))
    assert [trial.add(window(*[1.0] * requests)) for requests in (9, 1, 2, 4, 8)] == [True, True, True, True, False]
    assert not trial.measurement().stable
    assert trial.measurement().requests == 14


def test_a_trial_in_which_all_fails_ends_at_once(window):
    trial = Trial(ClosedLoop(1), Schedule())
    assert not trial.add(window(errors=Counter(UNAVAILABLE=3), error_texts={"UNAVAILABLE": "gone"}))
    measured = trial.measurement()
    assert (measured.errors, measured.error_texts) == ({"UNAVAILABLE": 3}, {"UNAVAILABLE": "gone"})
    assert (measured.requests, measured.latency_ms, measured.windows) == (0, None, ())
    # Slow is not failing.
    assert Trial(ClosedLoop(1), Schedule()).add(window())


def test_percentiles_are_numpy_s(window):
    latencies = np.random.default_rng(0).exponential(0.01, 3000)
    trial = Trial(ClosedLoop(1), Schedule())
    for part in (latencies[:1], *np.split(latencies, 3)):
        trial.add(window(*part))
    measured = trial.measurement().latency_ms
    ms = latencies * 1000
    expected = Latency(ms.mean(), *np.percentile(ms, [50, 90, 95, 99]), ms.max())
    for field in fields(Latency):
        assert getattr(measured, field.name) == pytest.approx(getattr(expected, field.name))


def test_rates_and_errors_add_up(window):
    trial = Trial(ClosedLoop(1), Schedule(max_windows=2))
    trial.add(window(1.0, errors=Counter(A=1), error_texts={"A": "first"}, dropped=1))
    trial.add(window(1.0, 3.0, seconds=2.0, tokens=20, bytes=6_000_000, busy_s=0.5, errors=Counter(A=2, B=1)))
    trial.add(window(2.0, seconds=2.0, tokens=10, bytes=2_000_000, busy_s=0.5, dropped=2, error_texts={"A": "later"}))
    measured = trial.measurement()
    assert (measured.requests, measured.seconds) == (3, 4.0)
    assert (measured.requests_per_s, measured.tokens_per_s, measured.mb_per_s) == (0.75, 7.5, 2.0)
    assert (measured.latency_ms.avg, measured.busy) == (2000.0, 0.25)
    assert (measured.errors, measured.dropped) == ({"A": 3, "B": 1}, 3)
    assert measured.error_texts == {"A": "first"}


def test_several_generators_at_once(window):
    whole = side_by_side(
        [
            window(1.0, 2.0, seconds=2.0, tokens=2, bytes=5, served=Served(2, queue_us=7), busy_s=1.5),
            window(3.0, seconds=4.0, tokens=1, bytes=6, served=Served(1, queue_us=1), busy_s=0.5, dropped=4),
        ]
    )
    assert (whole.seconds, whole.busy_s, whole.requests, whole.tokens, whole.bytes) == (3.0, 1.5, 3, 3, 11)
    assert (whole.served, whole.dropped) == (Served(3, queue_us=8), 4)
    assert one_after_the_other([]).requests == 0


def test_batches_are_counted_once(window):
    """A batch of 3 and one of 1: four replies come from two batches, with 2 requests on average, not 2.5."""
    served = Served()
    for requests, rows in ((3, 12), (3, 12), (3, 12), (1, 2)):
        served.add(
            SimpleNamespace(queue_us=1000, compute_us=2000, total_us=4000, batch_requests=requests, batch_rows=rows)
        )
    trial = Trial(ClosedLoop(1), Schedule(max_windows=1))
    trial.add(window(1.0))
    trial.add(window(1.0, served=served))
    measured = trial.measurement().server
    assert measured == Server(1.0, 2.0, 4.0, pytest.approx(2.0), pytest.approx(7.0))
