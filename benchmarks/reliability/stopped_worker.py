"""A worker that is stopped, as a hung process is: noticed, replaced, and no client fails."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

from reliability import health, sdk_load
from reliability.drain import outcome
from reliability.figure import Figure
from reliability.registry import scenario
from reliability.server import within
from reliability.setup import Setup

_WATCHDOG_FLAG = "--watchdog-seconds"
_WATCHDOG_S = 5.0
_CALLS_PER_S = 40.0


@scenario("stopped-worker", "a worker that is stopped is noticed within --watchdog-seconds, and replaced", seconds=15)
def stopped_worker(setup: Setup) -> Iterator[Figure]:
    watchdog = [_WATCHDOG_FLAG, _WATCHDOG_S] if setup.knows(_WATCHDOG_FLAG) else []
    server = setup.server("--workers", 2, *watchdog)
    callers = setup.beside(sdk_load.call_in_a_loop, server.target, 4, _CALLS_PER_S)
    checks = setup.beside(health.probe, server.target)
    victim = server.children[0]
    os.kill(victim, signal.SIGSTOP)
    stopped = time.monotonic()
    replaced_s = float("inf")
    for passed in within(max(setup.seconds, 2 * _WATCHDOG_S)):
        if replaced_s == float("inf") and not os.path.exists(f"/proc/{victim}"):  # noqa: PTH110
            replaced_s = passed
    yield Figure(what="stopped worker: ended after, s", value=replaced_s, at_most=_WATCHDOG_S + 2)
    seen: list[health.Seen] = checks.result()
    late = [one for one in seen if one.began > stopped + _WATCHDOG_S + 2]
    failed = [one for one in late if one.status != "SERVING"]
    yield Figure(what=f"failed health checks after that, of {len(late)}", value=len(failed), at_most=0)
    yield from outcome("stopped worker", callers.result())
    if os.path.exists(f"/proc/{victim}"):  # noqa: PTH110
        os.kill(victim, signal.SIGCONT)
    yield Figure(what="SIGTERM to the parent: ended after, s", value=server.stop(), at_most=40)
