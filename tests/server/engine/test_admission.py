"""Who may have how much in the server."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vqserve_server.config import EngineConfig
from vqserve_server.engine import Admission, Caller, CallerLimits
from vqserve_server.engine.admission import EngineStats
from vqserve_server.errors import Overloaded

MIB = 1 << 20


def admission(**config: int) -> Admission:
    return Admission(EngineConfig(**config), EngineStats())


def fill(admission: Admission, caller: Caller, rows: int = 0, nbytes: int = 0) -> int:
    """Enter as often as the caller may; return how often that was."""
    for count in range(10**6):
        try:
            admission.enter(caller, rows, nbytes)
        except Overloaded:
            return count
    raise AssertionError("there is no limit")


@contextmanager
def refused(text: str) -> Iterator[None]:
    with pytest.raises(Overloaded, match=text) as caught:
        yield
    assert 0.05 <= caught.value.retry_after_s <= 10


def test_a_caller_alone_gets_three_quarters() -> None:
    caller = Caller("192.0.2.1")
    whole = admission(max_queue_bytes=1024 * MIB, max_queue_requests=10**5)
    assert fill(whole, caller, nbytes=2 * MIB) == 384
    with refused("too many bytes of the caller 192.0.2.1 in the server"):
        whole.enter(caller, 0, 2 * MIB)


def test_what_is_small_still_finds_room_beside_large_requests_of_the_same_caller() -> None:
    caller = Caller("192.0.2.1")
    whole = admission(max_queue_bytes=1024 * MIB, max_queue_requests=10**5)
    fill(whole, caller, nbytes=16 * MIB)
    assert fill(whole, caller, nbytes=MIB) == 896 - 768
    # And others find room beside both.
    assert fill(whole, Caller("192.0.2.2"), nbytes=MIB) > 100


@pytest.mark.parametrize("greedy", [1, 2, 3, 10])
def test_there_is_room_for_one_that_has_little(greedy: int) -> None:
    whole = admission(max_queue_rows=10_000_000, max_queue_bytes=1 << 40, max_queue_requests=10**5)
    callers = [Caller(f"192.0.2.{number}") for number in range(greedy)]
    for caller in callers:
        fill(whole, caller, rows=20_000)
    # The first has most. All want everything, and each gets as many answers as any other.
    order = random.Random(0)
    for _ in range(3000):
        caller = order.choice(callers)
        if caller.requests:
            whole.leave(caller, 20_000, 0)
        for caller in order.sample(callers, greedy):
            fill(whole, caller, rows=20_000)
    # They have become equals, and a newcomer gets a part that is like a third of theirs.
    assert max(caller.rows for caller in callers) <= 1.5 * min(caller.rows for caller in callers)
    newcomer = Caller("198.51.100.1")
    assert fill(whole, newcomer, rows=1000) >= 10_000_000 // (3 * greedy + 1) // 1000 // 2


def test_limits_of_the_settings() -> None:
    caller = Caller("192.0.2.1")
    assert fill(admission(max_caller_requests=5), caller) == 5
    caller = Caller("192.0.2.1")
    assert fill(admission(max_caller_rows=100), caller, rows=10) == 10
    caller = Caller("192.0.2.1")
    assert fill(admission(max_caller_bytes=100 * MIB), caller, nbytes=10 * MIB) == 10


def test_limits_of_a_caller_count_instead() -> None:
    config = {"max_caller_requests": 5, "max_caller_rows": 100, "max_caller_bytes": 100 * MIB}
    assert fill(admission(**config), Caller("token", CallerLimits(requests=3))) == 3
    assert fill(admission(**config), Caller("token", CallerLimits(rows=40)), rows=10) == 4
    assert fill(admission(**config), Caller("token", CallerLimits(bytes=20 * MIB)), nbytes=10 * MIB) == 2
    # Nobody gets the part that is kept for others.
    assert fill(admission(max_queue_requests=400), Caller("token", CallerLimits(requests=400))) == 350


def test_a_caller_s_only_request_may_exceed_its_limits() -> None:
    whole = admission(max_caller_bytes=MIB)
    caller, other = Caller("192.0.2.1"), Caller("192.0.2.2")
    whole.enter(other, 0, 1)
    whole.enter(caller, 0, 2 * MIB)
    with refused("too many bytes of the caller"):
        whole.enter(caller, 0, 1)
    whole.leave(caller, 0, 2 * MIB)
    whole.enter(caller, 0, 1)


def test_refusals_are_counted_by_reason() -> None:
    stats = EngineStats()
    whole = Admission(EngineConfig(max_queue_requests=4), stats)
    caller, others = Caller("192.0.2.1"), [Caller(f"198.51.100.{number}") for number in range(4)]
    assert fill(whole, caller) == 3
    whole.enter(others[0], 0, 1)
    with refused("too many requests in the server"):
        whole.enter(others[1], 0, 1)
    assert stats.refused == {"caller_requests": 1, "requests": 1}
    assert stats.summary()["refused"] == 2
    assert stats.summary()["refused_caller_requests"] == 1
