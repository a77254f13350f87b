"""A device that hangs, is lost, or has too little memory; put into real servers on the CPU."""

from __future__ import annotations

import time
from collections.abc import Iterator

from reliability import health
from reliability.figure import Figure
from reliability.messages import ENCODE, encode_request, open_channel
from reliability.registry import scenario
from reliability.server import Server, within
from reliability.setup import Setup
from support.faults import FaultName, Faults

_WATCHDOG_S = 5.0
# "NOT_SERVING in under 1 s", and "within --watchdog-seconds".
_MOST_S: dict[FaultName, float] = {"sticky": 1.0, "hang": _WATCHDOG_S + 1}
_ROWS = 4096


@scenario("device-faults", "a device that hangs, is lost or has too little memory: noticed, and replaced", seconds=10)
def device_faults(setup: Setup) -> Iterator[Figure]:
    for fault, most_s in _MOST_S.items():
        if setup.wants(fault):
            yield from _ends(setup, fault, most_s)
            yield from _is_replaced(setup, fault, most_s)
    if setup.wants("out_of_memory"):
        yield from _halves(setup)


def _ends(setup: Setup, fault: FaultName, most_s: float) -> Iterator[Figure]:
    """One process: it says NOT_SERVING, fails what is in flight as UNAVAILABLE, and ends."""
    faults, server = _faulty(setup, f"alone-{fault}")
    with open_channel(server.target) as channel:
        channel.unary_unary(ENCODE)(encode_request(_ROWS), timeout=30)
        faults.put(fault)
        call = channel.unary_unary(ENCODE).future(encode_request(_ROWS), timeout=60)
        began = time.monotonic()
        came = call.code().name
        answered_s = time.monotonic() - began
        not_serving_s = float("inf")
        for _ in within(setup.seconds):
            if health.check(server.target).status != "SERVING":
                not_serving_s = time.monotonic() - began
                break
        ended_s = float("inf")
        for _ in within(setup.seconds):
            if server.process.poll() is not None:
                ended_s = time.monotonic() - began
                break
    yield Figure(what=f"{fault}: the call in flight", value=came, wanted="UNAVAILABLE")
    yield Figure(what=f"{fault}: the call in flight ended after, s", value=answered_s, at_most=most_s)
    yield Figure(what=f"{fault}: health was not SERVING after, s", value=not_serving_s, at_most=most_s)
    yield Figure(what=f"{fault}: the process ended after, s", value=ended_s, at_most=most_s + 5)


def _is_replaced(setup: Setup, fault: FaultName, most_s: float) -> Iterator[Figure]:
    """A worker: its supervisor starts another."""
    faults, server = _faulty(setup, f"worker-{fault}", "--workers", 2)
    before = server.children
    faults.put(fault)
    replaced_s = float("inf")
    for passed in within(most_s + 4 * setup.seconds):
        if server.log.count("worker_ready number=0") > 1:
            replaced_s = passed
            break
        # It happens at the next computation, the canary's or a caller's.
        health.check(server.target)
    yield Figure(what=f"{fault}: another worker was ready after, s", value=replaced_s, at_most=most_s + 20)
    kept = len(set(before) & set(server.children))
    yield Figure(what=f"{fault}: workers that went on", value=kept, at_least=1)


def _halves(setup: Setup) -> Iterator[Figure]:
    """Too little memory for a whole batch, then for anything."""
    faults, server = _faulty(setup, "memory")
    with open_channel(server.target) as channel:
        for rows, wanted in ((_ROWS // 4, "OK"), (0, "RESOURCE_EXHAUSTED")):
            faults.put("out_of_memory", rows)
            call = channel.unary_unary(ENCODE).future(encode_request(_ROWS), timeout=60)
            yield Figure(what=f"memory for {rows} of {_ROWS} rows: the call", value=call.code().name, wanted=wanted)
        faults.clear()
        call = channel.unary_unary(ENCODE).future(encode_request(_ROWS), timeout=60)
        yield Figure(what="memory for all rows again: the call", value=call.code().name, wanted="OK")
    status = health.check(server.target).status
    yield Figure(what="health after that", value=status, wanted="SERVING")


def _faulty(setup: Setup, name: str, *flags: object) -> tuple[Faults, Server]:
    folder = setup.scratch / f"faults-{name}"
    folder.mkdir()
    faults = Faults(folder)
    watchdog = ("--watchdog-seconds", _WATCHDOG_S) if setup.knows("--watchdog-seconds") else ()
    return faults, setup.server(*watchdog, *flags, environment=faults.environ)
