"""Several servers behind one name share the load, and so does one that comes later."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from reliability import names, received, sdk_load
from reliability.drain import outcome
from reliability.figure import Figure
from reliability.registry import scenario
from reliability.server import within
from reliability.setup import Setup
from support.names import name_server

HOSTS = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
_CLIENTS = 3
_CALLS_PER_S = 60.0
_AGE_FLAG = "--max-connection-age-seconds"
_AGE_S = 5
# gRPC asks for a name's addresses at most this often.
_RESOLVES_S = 30.0
# "Even within 20 %".
EVEN = 0.2


@scenario("balance", "three clients of a name share its servers, and find one that is started later", seconds=10)
def balance(setup: Setup) -> Iterator[Figure]:
    port = names.free_port(HOSTS)
    age = [_AGE_FLAG, _AGE_S] if setup.knows(_AGE_FLAG) else []
    first_two = [setup.server("--host", host, *age, port=port) for host in HOSTS[:2]]
    targets = [server.target for server in first_two]
    if setup.wants("list"):
        yield from _split(setup, "list of two", names.listed(targets), targets)
    if setup.wants("name"):
        named = setup.keep(name_server(*HOSTS[:2]))
        try:
            callers = setup.beside(sdk_load.call_in_a_loop, named.target(port), _CLIENTS, _CALLS_PER_S)
        except RuntimeError as error:
            yield Figure(what="name of two: the SDK", value=str(error)[:120], wanted="takes dns:// targets")
            return
        yield from even("name of two", received.shares(targets, setup.seconds))
        third = setup.server("--host", HOSTS[2], *age, port=port)
        named.addresses = HOSTS
        for _ in within(_RESOLVES_S + 2 * _AGE_S):
            pass
        yield from even("name of three", received.shares([*targets, third.target], setup.seconds))
        yield from outcome("name", callers.result())


def _split(setup: Setup, case: str, target: str, targets: Sequence[str]) -> Iterator[Figure]:
    callers = setup.beside(sdk_load.call_in_a_loop, target, _CLIENTS, _CALLS_PER_S)
    yield from even(case, received.shares(targets, setup.seconds))
    yield from outcome(case, callers.result())


def even(case: str, parts: dict[str, float]) -> Iterator[Figure]:
    """Return the figure of shares that must be even."""
    shown = " : ".join(f"{part:.2f}" for part in parts.values())
    yield Figure(what=f"{case}: shares of the load (1: even)", value=shown)
    farthest = max(abs(part - 1) for part in parts.values())
    yield Figure(what=f"{case}: farthest from even", value=farthest, at_most=EVEN)
