"""The connections of one client: to one server, to several, or several to one; each request goes to the least busy.

A connection that fails rests, and must answer a small request, a probe, before it gets others again. Names are
looked up again while the client is used. No thread waits for any of this: whoever sends a request starts what is due.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Collection
from typing import Any

import grpc

from vqserve.errors import Closed, VqserveError
from vqserve_client.channel import Connection, gate, identity_of
from vqserve_client.config import ClientConfig
from vqserve_client.resolver import resolve
from vqserve_client.retries import RetryBudget
from vqserve_client.status import Failure
from vqserve_client.target import Address

logger = logging.getLogger(__name__)

# How often a name is looked up again: always, and after a connection has failed.
LOOK_UP_S = 5.0
_LOOK_UP_AFTER_FAILURE_S = 1.0
# How often whoever sends a request looks whether something is due.
_LOOK_S = 0.05
_PROBE = "ListCodebooks"
_PROBE_S = 3.0
# A connection rests for the first time after its first failure, twice as long after the next, up to the last.
_FIRST_REST_S = 0.1
_LONGEST_REST_S = 2.0
# How long a server without the codebook of a call is left out: it may get it.
_LEFT_OUT_S = 10.0
# How long a request waits for the first of several servers to answer a probe, before it goes to any of them.
_PATIENCE_S = 1.0
_UNREACHABLE = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED})


class Member(Connection):
    """One of several connections; the pool that it belongs to reads and writes its state.

    Attributes:
        under_way: bytes of the requests that have no reply.
        turn: when it was chosen last, as a number that grows.
        is_proven: whether it has answered since it failed last.
        failures: failures since the last reply.
        rests_until: when it may be tried again, on the monotonic clock.
        is_probing: whether a probe is under way.
    """

    def __init__(self, config: ClientConfig, address: Address, *, pool: Pool) -> None:
        super().__init__(config, address, pool.identity)
        self._pool = pool
        self.reset()

    def reset(self) -> None:
        """Forget everything; what a name stands for is tried without a probe."""
        self.under_way = self.turn = self.failures = 0
        self.is_proven = self.address.is_name
        self.is_probing = False
        self.rests_until = 0.0

    def answered(self, request_bytes: int) -> None:
        """Take note that a request of this size is no longer under way."""
        self._pool.answered(self, request_bytes)

    def load(self) -> tuple[bool, int, int]:
        """Return what a request compares connections by: the least is chosen."""
        return not self.is_proven, self.under_way, self.turn


class Pool:
    """The connections of one client, in each process that uses it.

    Attributes:
        closed: whether `close` was called.
        identity: what the servers know the client by.
        retry_budget: limits the retries of this process.
    """

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self.identity = identity_of(config)
        self.closed = False
        target = config.address
        names = () if target.uses_proxy else tuple(address for address in target.addresses if address.is_name)
        self._names = [_Name(address) for address in names]
        self._only: Connection | None = None
        self._members: list[Member] = []
        if len(target.addresses) == config.connections == 1 and not names:
            # The usual case, which costs nothing.
            self._only = Connection(config, identity=self.identity)
        else:
            self._members = [
                Member(config, address, pool=self) for address in target.addresses for _ in range(config.connections)
            ]
        self._reset()
        _pools.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self.retry_budget = RetryBudget()
        # Members that get no more requests, and are closed when they have none.
        self._leaving: list[Member] = []
        # Until when a server and a digest do not go together.
        self._left_out: dict[tuple[str, str], float] = {}
        self._look_at = self._patient_until = 0.0
        self._turn = 0

    @property
    def target(self) -> str:
        """Return the addresses that the client was given."""
        return self._config.target

    @property
    def is_encrypted(self) -> bool:
        """Return whether the connections use TLS."""
        return self._config.tls is not None

    @property
    def has_token_file(self) -> bool:
        """Return whether the client's token may change."""
        return self._config.token_file is not None

    @property
    def size(self) -> int:
        """Return the number of connections that requests can go to now."""
        return len(self._members) or 1

    def pick(self, request_bytes: int, *, avoid: Collection[str] = (), digest: str | None = None) -> Connection | None:
        """Return the connection for a request, which is under way from now on; None: ask again in a moment.

        Args:
            request_bytes: size of the request; `Connection.answered` gives it back.
            avoid: addresses of servers to send it to only if there is no other.
            digest: digest that the request names; None: it names none.

        Raises:
            Closed: after `close`.
        """
        if self._only is not None:
            return self._only
        now = time.monotonic()
        if now >= self._look_at:
            self._look(now)
        with self._lock:
            if self.closed:
                raise Closed("this client is closed", target=self.target)
            best = min(
                self._members,
                key=lambda one: (one.address.uri in avoid, self._lacks(one, digest, now), *one.load()),
            )
            if best.is_probing and best.failures == 0 and now < self._patient_until:
                return None
            self._turn += 1
            best.turn = self._turn
            best.under_way += request_bytes
            return best

    def answered(self, member: Member, request_bytes: int) -> None:
        """Take note that a request is no longer under way."""
        with self._lock:
            member.under_way -= request_bytes

    def succeeded(self, connection: Connection) -> None:
        """Take note of a reply; only one after a failure, or the first, changes anything."""
        if isinstance(connection, Member):
            with self._lock:
                connection.failures, connection.is_proven = 0, True

    def failed(self, connection: Connection, failure: Failure) -> None:
        """Let a connection rest whose request has failed and may be sent again."""
        if not isinstance(connection, Member):
            return
        now = time.monotonic()
        with self._lock:
            self._rest(connection, now, at_least_s=failure.retry_after_s or 0.0)
            for name in self._names:
                name.look_up_at = min(name.look_up_at, name.looked_up_at + _LOOK_UP_AFTER_FAILURE_S)

    def has_other(self, avoid: Collection[str], digest: str | None = None) -> bool:
        """Return whether a request can go to a server that is not among these, and is not known to fail."""
        if self._only is not None:
            return False
        now = time.monotonic()
        with self._lock:
            return any(
                (one.is_proven or not one.failures)
                and one.address.uri not in avoid
                and not self._lacks(one, digest, now)
                for one in self._members
            )

    def leave_out(self, connection: Connection, digest: str, error: VqserveError) -> None:
        """Send no requests for this digest to this server for a while: it has another codebook, or none."""
        if self.size == 1:
            return
        with self._lock:
            key = connection.address.uri, digest
            is_new = key not in self._left_out
            self._left_out[key] = time.monotonic() + _LEFT_OUT_S
        if is_new:
            logger.warning("server %s is left out of calls with digest %s: %s", *key, error.message)

    def has_codebooks(self, connection: Connection, digests: Collection[str]) -> None:
        """Take note that a server has these codebooks."""
        if self._left_out:
            with self._lock:
                for digest in digests:
                    self._left_out.pop((connection.address.uri, digest), None)

    def close(self) -> None:
        """Close all connections; calls that run fail."""
        with self._lock:
            self.closed = True
            connections = [*self._members, *self._leaving, *([self._only] if self._only is not None else [])]
        for connection in connections:
            connection.close()

    def after_fork_in_child(self) -> None:
        """Drop what is about requests of the parent, and locks that one of its threads may have held."""
        self._reset()
        for member in self._members:
            member.reset()
        for name in self._names:
            name.reset()

    def _lacks(self, member: Member, digest: str | None, now: float) -> bool:
        if digest is None or not self._left_out:
            return False
        return self._left_out.get((member.address.uri, digest), 0.0) > now

    def _look(self, now: float) -> None:
        """Start what is due: probes, looking up names, closing connections that are no longer used."""
        with self._lock:
            if now < self._look_at or self.closed:
                return
            if self._look_at == 0.0:
                self._patient_until = now + _PATIENCE_S
            self._look_at = now + _LOOK_S
            # Nothing depends on whether the only one is proven.
            several = self._members if len(self._members) > 1 else ()
            unproven = [one for one in several if not one.is_proven and not one.is_probing and now >= one.rests_until]
            for member in unproven:
                member.is_probing = True
            names = [name for name in self._names if not name.is_looked_up and now >= name.look_up_at]
            for name in names:
                name.is_looked_up = True
            unused = [one for one in self._leaving if not one.under_way]
            self._leaving = [one for one in self._leaving if one.under_way]
        for member in unproven:
            self._probe(member)
        for name in names:
            threading.Thread(target=self._look_up, args=(name,), name="vqserve-names", daemon=True).start()
        for member in unused:
            member.close()

    def _probe(self, member: Member) -> None:
        """Ask a connection for something small; the connection is used again when the answer comes."""
        calls: list[Any] = []

        def cancel() -> None:
            for call in calls:
                call.cancel()

        gate.enter(cancel)
        try:
            # The first answer is to come soon, later ones as soon as the server is there.
            call = member.method(_PROBE).future(
                b"", timeout=_PROBE_S, metadata=member.metadata("probe"), wait_for_ready=member.failures > 0
            )
            calls.append(call)
        except Exception:
            gate.leave(cancel)
            logger.debug("no probe of %s", member.address.uri, exc_info=True)
            self._probed(member, works=False)
            return
        call.add_done_callback(lambda call: self._on_probe(member, call, cancel))

    def _on_probe(self, member: Member, call: Any, cancel: Callable[[], None]) -> None:
        gate.leave(cancel)
        self._probed(member, works=call.code() not in _UNREACHABLE)

    def _probed(self, member: Member, *, works: bool) -> None:
        with self._lock:
            member.is_probing = False
            if works:
                # Its failures are forgotten only with a reply to a caller's request.
                member.is_proven = True
            else:
                self._rest(member, time.monotonic())

    def _rest(self, member: Member, now: float, *, at_least_s: float = 0.0) -> None:
        member.is_proven = False
        # Requests that fail together count once.
        if now >= member.rests_until:
            rest_s = min(_LONGEST_REST_S, _FIRST_REST_S * 2.0 ** min(member.failures, 16))
            member.failures += 1
            member.rests_until = now + max(rest_s, min(at_least_s, _LONGEST_REST_S))

    def _look_up(self, name: _Name) -> None:
        try:
            found = resolve(name.address)
        except (OSError, UnicodeError) as error:
            # gRPC asks, too, and its error is the one that callers see; known addresses stay.
            logger.debug("cannot look up %s: %s", name.address.host, error)
            found = name.found
        # With one address, gRPC's connection to the name does all that is needed.
        addresses = [name.address.at(ip) for ip in found] if len(found) > 1 else [name.address]
        now = time.monotonic()
        with self._lock:
            name.found = found
            name.is_looked_up = False
            name.looked_up_at, name.look_up_at = now, now + LOOK_UP_S
            if addresses == name.addresses or self.closed:
                return
            before, name.addresses = name.addresses, addresses
            self._leaving += [one for one in self._members if one.address in before and one.address not in addresses]
            new = [
                Member(self._config, address, pool=self)
                for address in addresses
                if address not in before
                for _ in range(self._config.connections)
            ]
            self._members = [one for one in self._members if one not in self._leaving] + new
            if not any(one.is_proven for one in self._members):
                self._patient_until = now + _PATIENCE_S
            self._look_at = 0.0
        logger.debug("%s is now %s", name.address.host, ", ".join(found))


class _Name:
    """A name that is looked up again and again.

    Attributes:
        address: the name.
        found: its IP addresses, as found last.
        addresses: what the pool connects to for it.
        is_looked_up: whether it is being looked up.
        looked_up_at, look_up_at: when it was looked up last, and will be, on the monotonic clock.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self.found: tuple[str, ...] = ()
        self.addresses = [address]
        self.reset()

    def reset(self) -> None:
        """Let it be looked up at once."""
        self.is_looked_up = False
        self.looked_up_at = self.look_up_at = 0.0


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for pool in list(_pools):
        pool.after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
