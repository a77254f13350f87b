"""Requests and their replies: a bounded window, retries and a deadline, without ever waiting.

What a call does is a generator of *steps*. It sends what may be sent, takes the replies that have come, and yields how
many seconds it can be left alone unless a reply comes sooner (None: until then). Whoever drives it does the waiting:
client.py on a Bell (interrupts.py), async_client.py on an asyncio.Event. That is all in which they differ.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Generator, Iterator
from typing import Any, Protocol, TypeVar

import grpc

from vqserve_client.channel import Connection
from vqserve_client.errors import Closed, DeadlineExceeded, ProtocolError, VqserveError
from vqserve_client.retry import Deadline, RetryPolicy
from vqserve_client.status import Failure, text_metadata
from vqserve_client.stream import StreamTicket
from vqserve_client.unary import Sender

T = TypeVar("T")
Steps = Generator[float | None, None, T]


class Part(Protocol):
    """One request of a call and what becomes of its reply."""

    @property
    def method(self) -> str:
        """Return the name of the RPC."""

    def explain(self, error: VqserveError) -> VqserveError:
        """Return the error that the server answered with as one about the caller's whole array."""

    def request(self) -> bytes:
        """Return the message to send."""

    def accept(self, reply: bytes) -> None:
        """Check the reply and put it to use."""


class Budget:
    """How many requests of one call may be under way, shared by the items of `encode_many`."""

    def __init__(self, window: int) -> None:
        self.free = window
        self.given_back = 0

    def take(self) -> None:
        """Take one place."""
        self.free -= 1

    def give_back(self, places: int = 1) -> None:
        """Give places back; who waits for one can tell by `given_back` that it is worth looking again."""
        self.free += places
        self.given_back += places


class Exchange:
    """What the requests of one call have in common."""

    def __init__(
        self,
        connection: Connection,
        *,
        policy: RetryPolicy,
        deadline: Deadline,
        budget: Budget,
        sender: Sender,
    ) -> None:
        self._connection = connection
        self._policy = policy
        self._deadline = deadline
        self._budget = budget
        self._sender = sender
        self._pid = os.getpid()
        self._request_id = secrets.token_hex(8)
        self._sent = 0

    @property
    def target(self) -> str:
        """Return the server's address."""
        return self._connection.target

    def run(self, parts: Iterator[Part], codebook: str | None) -> Steps[None]:
        """Send the request of every part and hand each its reply.

        Raises:
            VqserveError: as soon as one part fails for good; the others are cancelled.
        """
        running: list[_Running] = []
        upcoming = next(parts, None)
        try:
            while running or upcoming is not None:
                while upcoming is not None and self._budget.free > 0:
                    self._sent += 1
                    self._budget.take()
                    running.append(_Running(upcoming, codebook, f"{self._request_id}-{self._sent}"))
                    upcoming = next(parts, None)
                wait_s: float | None = None
                progress = False
                for one in list(running):
                    due_s = self._advance(one)
                    if one.done:
                        running.remove(one)
                        self._budget.give_back()
                        progress = True
                    elif due_s is not None:
                        wait_s = due_s if wait_s is None else min(wait_s, due_s)
                # A place in the window came free: the next request goes out before anything is waited for.
                if not (progress and (upcoming is not None or not running)):
                    yield wait_s
        finally:
            self._budget.give_back(len(running))
            if os.getpid() == self._pid:
                for one in running:
                    if one.ticket is not None:
                        one.ticket.cancel()

    def _advance(self, one: _Running) -> float | None:
        """Send, or take the reply, or wait for the next attempt; return the seconds until that."""
        if one.ticket is not None and one.ticket.done():
            ticket, one.ticket = one.ticket, None
            if ticket.code() is grpc.StatusCode.OK:
                try:
                    one.part.accept(ticket.result())
                except ProtocolError as error:
                    error.request_id = one.request_id
                    raise
                one.done = True
                return None
            self._back_off(one, ticket)
        if one.ticket is None:
            wait_s = one.resume_at - time.monotonic()
            if wait_s > 0:
                return wait_s
            self._send(one)
        # gRPC keeps the time of a call, but not of a request on a stream.
        return self._time_left(one) if isinstance(one.ticket, StreamTicket) else None

    def _time_left(self, one: _Running) -> float | None:
        left_s = self._deadline.grpc_timeout_s()
        if left_s is not None and left_s <= 0:
            raise DeadlineExceeded(
                "the server did not answer in time",
                target=self.target,
                codebook=one.codebook,
                request_id=one.request_id,
            )
        return left_s

    def _send(self, one: _Running) -> None:
        timeout_s = self._deadline.grpc_timeout_s()
        if timeout_s is not None and timeout_s <= 0:
            raise DeadlineExceeded(
                "the time was up before all of the call was sent",
                target=self.target,
                codebook=one.codebook,
            )
        request = one.part.request()
        try:
            one.ticket = self._sender.send(one.part.method, request, timeout_s=timeout_s, request_id=one.request_id)
        except ValueError as error:
            if self._connection.closed:
                raise self._closed() from error
            raise

    def _back_off(self, one: _Running, ticket: Any) -> None:
        """Set the time of the next attempt, or raise why there is none."""
        if self._connection.closed:
            raise self._closed()
        if isinstance(ticket, StreamTicket) and ticket.passed_over:
            # No attempt of its own: it goes out again, and whose failure it was has been counted there.
            return
        one.failures += 1
        failure = Failure(ticket.code(), ticket.details() or "", text_metadata(ticket.trailing_metadata()))
        if one.failure is None or not (one.failure.is_foreign and failure.is_unsent):
            one.failure = failure
        delay_s = self._policy.delay_s(one.failures, failure.retry_after_s) if failure.is_retried else None
        if delay_s is None or delay_s >= self._deadline.remaining_s():
            error = one.failure.error(target=self.target, codebook=one.codebook, request_id=one.request_id)
            error = one.part.explain(error)
            raise error if one.failures == 1 else error.noted(f"tried {one.failures} times")
        one.resume_at = time.monotonic() + delay_s

    def _closed(self) -> Closed:
        return Closed("this client was closed during the call", target=self.target)


class _Running:
    """One part between its first attempt and its reply."""

    def __init__(self, part: Part, codebook: str | None, request_id: str) -> None:
        self.part = part
        self.codebook = codebook
        self.request_id = request_id
        self.ticket: Any = None
        self.failures = 0
        # The last one; of those that reached no server the one that tells more.
        self.failure: Failure | None = None
        self.resume_at = 0.0
        self.done = False
