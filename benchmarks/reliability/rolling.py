"""Three servers are restarted, killed or stopped one after the other, and no client notices."""

from __future__ import annotations

import signal
from collections.abc import Iterator

from reliability import names, received, sdk_load
from reliability.balance import HOSTS, even
from reliability.drain import outcome
from reliability.figure import Figure
from reliability.registry import scenario
from reliability.server import within
from reliability.setup import Setup

_CLIENTS = 6
_CALLS_PER_S = 60.0
_FAULTS = {"restart": signal.SIGTERM, "kill": signal.SIGKILL, "stop": signal.SIGSTOP}
# A stopped process is left so for this time, as until a probe notices; then it is killed.
_STOPPED_S = 15.0
_DOWN_S = 1.0


@scenario("rolling", "restart, kill -9 and SIGSTOP of three servers in turn: no client sees an error", seconds=60)
def rolling(setup: Setup) -> Iterator[Figure]:
    for name, number in _FAULTS.items():
        if setup.wants(name):
            yield from _roll(setup, name, number)


def _roll(setup: Setup, name: str, number: int) -> Iterator[Figure]:
    port = names.free_port(HOSTS)
    servers = [setup.server("--host", host, port=port) for host in HOSTS]
    targets = [server.target for server in servers]
    callers = setup.beside(sdk_load.call_in_a_loop, names.listed(targets), _CLIENTS, _CALLS_PER_S)
    for i, host in enumerate(HOSTS):
        servers[i].send(number)
        if number == signal.SIGSTOP:
            _wait(min(_STOPPED_S, setup.seconds))
        if number == signal.SIGTERM:
            servers[i].process.wait(60)
        else:
            servers[i].kill()
        _wait(_DOWN_S)
        servers[i] = setup.server("--host", host, port=port)
        # The last sixth of the time is measured, the end of the minute.
        _wait(setup.seconds * 5 / 6)
        yield from even(f"{name} {i + 1}, {setup.seconds:g} s later", received.shares(targets, setup.seconds / 6))
    yield from outcome(name, callers.result())
    for server in servers:
        server.kill()


def _wait(seconds: float) -> None:
    for _ in within(seconds):
        pass
