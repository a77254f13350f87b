"""Small callers beside a greedy one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from reliability import loads
from reliability.arrivals import Arrivals, Requests, arrive, percentile
from reliability.figure import Figure
from reliability.messages import MIB
from reliability.registry import scenario
from reliability.server import within
from reliability.setup import Setup

_SMALL = Requests(rate=200.0, rows=64, connections=20)
# "Within 3x of alone."
_MOST_RATIO = 3.0
_GREEDY: tuple[tuple[str, Callable[..., Any], int, int], ...] = (
    ("32 streams of 1 MiB", loads.greedy_streams, 32, MIB),
    ("32 streams of 16 MiB", loads.greedy_streams, 32, 16 * MIB),
    ("8 callers of 63 MiB", loads.greedy_callers, 8, 63 * MIB),
)


@scenario("fairness", "20 small callers beside one greedy caller, of another address and of theirs", seconds=10)
def fairness(setup: Setup) -> Iterator[Figure]:
    path = setup.scratch / "fairness.sock"
    # Callers of the socket file are another caller than those of the port: no second machine is needed.
    for case, greedy_target in (("another caller", f"unix:{path}"), ("the same address", None)):
        for name, load, count, nbytes in _GREEDY:
            if not setup.wants(f"{case}, {name}"):
                continue
            server = setup.server("--unix-socket", path)
            alone = _small(setup, server.target)
            greedy = setup.beside(load, greedy_target or server.target, count, nbytes)
            # Its first requests all come at once.
            for _ in within(2.0):
                pass
            beside = _small(setup, server.target)
            seen = greedy.result()
            yield from _compared(f"{case}, {name}", alone, beside)
            yield Figure(what=f"{case}, {name}: the greedy one's", value=loads.text(seen))
            server.kill()


def _small(setup: Setup, target: str) -> Arrivals:
    """Return what became of the calls of the small callers."""
    small = setup.beside(arrive, target, _SMALL)
    for _ in within(setup.seconds):
        pass
    seen: Arrivals = small.result()
    return seen


def _compared(case: str, alone: Arrivals, beside: Arrivals) -> Iterator[Figure]:
    for part in (0.5, 0.99):
        values = [percentile(seen.answered_ms, part) for seen in (alone, beside)]
        shown = " : ".join(f"{value:.1f}" for value in values)
        yield Figure(what=f"{case}: p{100 * part:g} alone : beside, ms", value=shown)
    yield Figure(what=f"{case}: p99 beside / alone", value=values[1] / values[0], at_most=_MOST_RATIO)
    for part in (0.5, 0.99):
        inside = percentile(beside.served_ms, part)
        yield Figure(what=f"{case}: p{100 * part:g} beside, in the server, ms", value=inside)
    failed = beside.sent - beside.ended["OK"]
    yield Figure(what=f"{case}: small calls that failed, of {beside.sent}", value=failed, at_most=0)
