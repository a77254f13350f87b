"""Small callers beside a greedy one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from reliability import loads
from reliability.figure import Figure
from reliability.messages import ENCODE, MIB, encode_request
from reliability.registry import scenario
from reliability.server import within
from reliability.setup import Setup
from vqserve_bench import Latency, OpenLoop, Schedule, measure

_CALLERS = 20
_CALLS_PER_S = 200.0
_SMALL_ROWS = 64
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
            alone = _small(server.target, setup.seconds)
            greedy = setup.beside(load, greedy_target or server.target, count, nbytes)
            for _ in within(1.0):
                pass
            beside = _small(server.target, setup.seconds)
            seen = greedy.result()
            yield Figure(what=f"{case}, {name}: alone p50, ms", value=alone.p50)
            yield Figure(what=f"{case}, {name}: alone p99, ms", value=alone.p99)
            yield Figure(what=f"{case}, {name}: beside p50, ms", value=beside.p50)
            yield Figure(what=f"{case}, {name}: beside p99, ms", value=beside.p99)
            ratio = beside.p99 / alone.p99
            yield Figure(what=f"{case}, {name}: p99 beside / alone", value=ratio, at_most=_MOST_RATIO)
            yield Figure(what=f"{case}, {name}: the greedy one's", value=loads.text(seen))
            server.kill()


def _small(target: str, seconds: float) -> Latency:
    """Return the latency of the small callers."""
    measured = measure(
        target,
        ENCODE,
        [encode_request(_SMALL_ROWS)],
        OpenLoop(_CALLS_PER_S),
        schedule=Schedule(warmup_s=0.5, window_s=seconds, max_windows=1),
        connections=_CALLERS,
    )
    if measured.errors:
        raise RuntimeError(f"small calls failed: {measured.error_texts}")
    return measured.latency_ms or Latency(**dict.fromkeys(("avg", "p50", "p90", "p95", "p99", "max"), float("inf")))
