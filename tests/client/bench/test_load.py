"""How a load is made, and spread over processes."""

from __future__ import annotations

import math
from itertools import islice

import numpy as np
import pytest

from vqserve_bench import ClosedLoop, OpenLoop, Request
from vqserve_bench.job import Job
from vqserve_bench.load import gaps, shares
from vqserve_client.config import ClientConfig


def test_gaps_are_exponential_and_seeded():
    drawn = np.array(list(islice(gaps(200.0, 7), 100_000)))
    # The mean of n gaps has a standard deviation of mean / sqrt(n).
    assert abs(drawn.mean() * 200 - 1) < 5 / math.sqrt(len(drawn))
    # An exponential distribution's standard deviation is its mean, and a share of 1/e is above it.
    assert abs(drawn.std() * 200 - 1) < 0.05
    assert abs((drawn > 1 / 200).mean() - math.exp(-1)) < 0.01
    assert list(islice(gaps(200.0, 7), 9)) == drawn[:9].tolist()
    assert list(islice(gaps(200.0, 8), 9)) != drawn[:9].tolist()


@pytest.mark.parametrize(
    ("total", "parts", "expected"), [(10, 4, (3, 3, 2, 2)), (2, 4, (1, 1)), (1, 1, (1,)), (8, 4, (2, 2, 2, 2))]
)
def test_shares(total, parts, expected):
    assert shares(total, parts) == expected


def job(load, **more):
    return Job(config=ClientConfig(target="localhost:1"), method="/a.B/C", requests=(Request(b"x"),), load=load, **more)


def test_jobs_of_several_processes_are_the_whole_together():
    parts = job(ClosedLoop(10), streams=3).split(4)
    assert [part.load.concurrency for part in parts] == [4, 3, 3]
    assert [part.streams for part in parts] == [1, 1, 1]
    parts = job(OpenLoop(90.0, max_outstanding=8), seed=5).split(3)
    assert [part.load for part in parts] == [OpenLoop(30.0, 3), OpenLoop(30.0, 3), OpenLoop(30.0, 2)]
    # Two processes that draw the same gaps would send in pairs.
    assert len({part.seed for part in parts}) == 3
    assert len(job(ClosedLoop(1), streams=2).split(2)) == 1
    assert len(job(ClosedLoop(5)).split(1)) == 1


def test_the_order_is_seeded_and_gives_each_request_its_turn():
    requests = tuple(Request(bytes([i])) for i in range(9))
    made = Job(
        config=ClientConfig(target="localhost:1"), method="/a.B/C", requests=requests, load=ClosedLoop(1), seed=3
    )
    order = list(islice(made.order(), 18))
    assert sorted(order[:9]) == sorted(requests)
    assert order[:9] == order[9:] != list(requests)
    assert list(islice(made.order(), 18)) == order


@pytest.mark.parametrize(
    "make",
    [
        lambda: ClosedLoop(0),
        lambda: OpenLoop(0.0),
        lambda: OpenLoop(math.inf),
        lambda: OpenLoop(1.0, 0),
        lambda: job(ClosedLoop(1), streams=-1),
        lambda: job(ClosedLoop(1), connections=0),
        lambda: Job(config=ClientConfig(target="localhost:1"), method="/a.B/C", requests=(), load=ClosedLoop(1)),
    ],
)
def test_invalid_loads_are_rejected(make):
    with pytest.raises(ValueError, match=r"must be"):
        make()
