"""The signs of life of a worker, and the counting of checks."""

from __future__ import annotations

import pytest

from vqserve_server.heartbeat import HEARTBEAT_VARIABLE, Checks, Heartbeat, Pulse


def test_signs_of_life() -> None:
    pulse = Pulse()
    heartbeat = Heartbeat.of({HEARTBEAT_VARIABLE: str(pulse.sender)})
    assert heartbeat is not None
    assert pulse.has_beaten() is False
    heartbeat.beat()
    heartbeat.beat()
    assert pulse.has_beaten() is True
    assert pulse.has_beaten() is False
    heartbeat.close()
    assert pulse.has_beaten() is None
    # Both may be late.
    heartbeat.beat()
    heartbeat.close()
    pulse.close()


def test_a_parent_that_does_not_read_holds_nobody_up() -> None:
    pulse = Pulse()
    heartbeat = Heartbeat(pulse.sender)
    for _ in range(100_000):
        heartbeat.beat()
    assert pulse.has_beaten() is True
    pulse.close()
    heartbeat.beat()
    heartbeat.close()


def test_without_a_parent_there_is_none() -> None:
    assert Heartbeat.of({}) is None


@pytest.mark.parametrize(
    ("seconds", "interval_s", "most"), [(30.0, 1.0, 30), (20.0, 1.0, 20), (3.0, 0.15, 20), (86400.0, 1.0, 86400)]
)
def test_checks(seconds: float, interval_s: float, most: int) -> None:
    assert Checks.of(seconds) == (pytest.approx(interval_s), most)
