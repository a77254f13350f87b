"""The tests' own helpers: that they end, and that `make test-fast` leaves out what it says."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from support.processes import starts_a_process
from support.waiting import eventually, read_until


def test_what_becomes_true_is_returned() -> None:
    values = iter([0, None, 3])
    assert eventually(lambda: next(values)) == 3


def test_what_stays_false_fails_with_its_last_value() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"still not true after 0\.01 s, the last value is \[\]"):
        eventually(list, seconds=0.01)


def test_a_log_is_read_to_the_line_and_no_further() -> None:
    log = io.StringIO("one\ntwo\nthree\n")
    assert read_until(log, "tw") == "two\n"
    assert log.readline() == "three\n"


def test_a_log_that_ends_without_the_line_fails_with_what_it_had() -> None:
    with pytest.raises(pytest.fail.Exception, match="no line with 'x' but: one"):
        read_until(io.StringIO("one\n"), "x")


class Starter:
    def start(self) -> None:
        subprocess.run([sys.executable, "-c", ""], check=True)


@pytest.fixture
def started() -> Callable[[], None]:
    return lambda: Starter().start()


def test_a_test_that_starts_processes_by_a_fixture_is_marked(started: Any, request: pytest.FixtureRequest) -> None:
    assert starts_a_process(request.node)
    assert request.node.get_closest_marker("process")


def test_a_test_that_starts_none_is_not_marked(request: pytest.FixtureRequest) -> None:
    assert not request.node.get_closest_marker("process")
