"""Requests and their replies: a bounded window, retries and a deadline, without ever waiting.

A call is a generator of *steps*. It sends what may be sent, takes the replies that have come, and yields how many
seconds may pass before it must be resumed even if no reply comes (None: no limit). The clients do the waiting:
client.py with a Waker (interrupts.py), async_client.py with an asyncio.Event. They differ in nothing else.
"""

from __future__ import annotations

import os
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Iterator
from typing import TypeVar

import grpc

from vqserve.errors import Closed, DeadlineExceeded, Overloaded, ProtocolError, Unauthenticated, VqserveError
from vqserve_client.channel import Connection
from vqserve_client.identity import Metadata
from vqserve_client.pool import Pool
from vqserve_client.retries import RetryPolicy
from vqserve_client.status import Failure, text_metadata
from vqserve_client.transport import Outgoing, ReplyFuture, Sender, StreamFuture

# Not the system's source, which costs a call of the kernel. In a child it begins anew, or it would repeat its parent's.
_ids = random.Random()  # noqa: S311
os.register_at_fork(after_in_child=_ids.seed)

T = TypeVar("T")
Steps = Generator[float | None, None, T]

# gRPC's own arithmetic on deadlines is not reliable beyond this: a longer time is sent as no deadline.
_FOREVER_S = 365 * 86400.0
# How often a request goes to another server because one has another codebook.
_MOST_OTHERS = 10
# How soon a request looks again for a connection, if none of several is open yet.
_LOOK_AGAIN_S = 0.02


class Deadline:
    """The end of one call on the monotonic clock."""

    def __init__(self, timeout_s: float) -> None:
        self._expires_at = time.monotonic() + timeout_s

    def extend(self, seconds: float) -> None:
        """Move the end by a time during which the call was paused."""
        self._expires_at += seconds

    def remaining_s(self) -> float:
        """Return the seconds that are left, perhaps negative."""
        return self._expires_at - time.monotonic()

    def grpc_timeout_s(self) -> float | None:
        """Return the seconds until the deadline; None, as in gRPC: no limit."""
        remaining_s = self._expires_at - time.monotonic()
        return None if remaining_s > _FOREVER_S else remaining_s


class Window:
    """Number of further requests of one call that may be in flight; the items of `encode_many` share one.

    Attributes:
        free: how many more may be sent now.
        released: how many places were ever released: a change means that it is worth looking again.
    """

    def __init__(self, size: int) -> None:
        self.free = size
        self.released = 0

    def take(self) -> None:
        """Take one place."""
        self.free -= 1

    def release(self, places: int = 1) -> None:
        """Release places."""
        self.free += places
        self.released += places


class Request(ABC):
    """One request of a call, from before its first attempt until its reply.

    Attributes:
        method: name of the RPC.
        request_id: names the request in the server's log.
        future: future of the attempt that is in flight, or its reply; None between attempts.
        connection: the connection of the last attempt.
        avoid: addresses of the servers where it has failed since it waited last.
        failures: attempts that failed, but for those after which another server was tried at once.
        others: how often a server had another codebook.
        failure: the last one; of several that reached no server, the one that says most.
        resume_at: when the next attempt may be made, on the monotonic clock.
        is_answered: whether its reply was taken.
    """

    method: str
    request_id = ""
    future: ReplyFuture | bytes | None = None
    connection: Connection | None = None
    avoid: Collection[str] = ()
    failures = 0
    others = 0
    failure: Failure | None = None
    resume_at = 0.0
    is_answered = False

    @abstractmethod
    def message(self) -> bytes:
        """Return the message to send."""

    @abstractmethod
    def accept(self, reply: bytes) -> None:
        """Check the reply and store its array."""

    @abstractmethod
    def explain(self, error: VqserveError) -> VqserveError:
        """Return an error of the server, which has a part of the caller's array, as one about the whole."""


class Exchange:
    """The state that the requests of one call share.

    Attributes:
        sent: requests that were begun.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        policy: RetryPolicy,
        deadline: Deadline,
        window: Window,
        sender: Sender,
        trace: Metadata = (),
    ) -> None:
        """Send nothing yet; `trace` is the metadata that tells the server of the call's span."""
        self._pool = pool
        self._policy = policy
        self._deadline = deadline
        self._window = window
        self._sender = sender
        self._trace = trace
        self._budget = pool.retry_budget
        self._pid = os.getpid()
        self._id = f"{_ids.getrandbits(64):016x}"
        self._digest: str | None = None
        self.sent = 0

    def run(self, requests: Iterator[Request], codebook: str | None, digest: str | None = None) -> Steps[None]:
        """Send every request and hand it its reply.

        Args:
            requests: the requests.
            codebook: name of the codebook that they are about, for errors.
            digest: digest that they name: a server that has another is left out.

        Raises:
            VqserveError: as soon as one request fails for good; the others are cancelled.
        """
        self._digest = digest
        running: list[Request] = []
        upcoming = next(requests, None)
        try:
            while running or upcoming is not None:
                while upcoming is not None and self._window.free > 0:
                    self.sent += 1
                    self._window.take()
                    upcoming.request_id = f"{self._id}-{self.sent}"
                    running.append(upcoming)
                    upcoming = next(requests, None)
                wait_s: float | None = None
                progress = False
                alone = len(running) == 1 and (upcoming is None or self._window.free <= 0)
                for request in list(running):
                    due_s = self._advance(request, codebook, alone=alone)
                    if request.is_answered:
                        running.remove(request)
                        self._window.release()
                        progress = True
                    elif due_s is not None:
                        wait_s = due_s if wait_s is None else min(wait_s, due_s)
                # A place in the window is free again: send the next request before waiting.
                if not (progress and (upcoming is not None or not running)):
                    yield wait_s
        finally:
            if running:
                self._window.release(len(running))
                if os.getpid() == self._pid:
                    for request in running:
                        if request.future is not None and not isinstance(request.future, bytes):
                            request.future.cancel()

    def _advance(self, request: Request, codebook: str | None, *, alone: bool) -> float | None:
        """Send the request if its time has come, take its reply if it is there.

        Returns:
            The seconds until the request must be looked at again; None: when its reply comes, if there is none yet.
        """
        while True:
            future = request.future
            if future is None:
                wait_s = request.resume_at - time.monotonic() if request.resume_at else 0.0
                if wait_s > 0:
                    return wait_s
                self._send(request, codebook, alone=alone)
                future = request.future
                if future is None:
                    # No connection is open yet.
                    request.resume_at = time.monotonic() + _LOOK_AGAIN_S
                    return _LOOK_AGAIN_S
            if isinstance(future, bytes):
                self._take_reply(request, future)
                return None
            if not future.done():
                # gRPC enforces the deadline of a call, but not that of a request on a stream.
                return self._time_left(request, codebook) if isinstance(future, StreamFuture) else None
            if future.code() is grpc.StatusCode.OK:
                self._take_reply(request, future.result())
                return None
            request.future = None
            self._back_off(request, future, codebook)

    def _take_reply(self, request: Request, reply: bytes) -> None:
        request.future = None
        try:
            request.accept(reply)
        except ProtocolError as error:
            error.request_id = request.request_id
            raise
        request.is_answered = True
        if self._budget.is_spent:
            self._budget.earn()
        connection = request.connection
        if connection is not None and (connection.failures or not connection.is_proven):
            self._pool.succeeded(connection)

    def _time_left(self, request: Request, codebook: str | None) -> float | None:
        left_s = self._deadline.grpc_timeout_s()
        if left_s is not None and left_s <= 0:
            raise DeadlineExceeded(
                "the server did not answer in time",
                target=self._server(request),
                codebook=codebook,
                request_id=request.request_id,
            )
        return left_s

    def _send(self, request: Request, codebook: str | None, *, alone: bool) -> None:
        timeout_s = self._deadline.grpc_timeout_s()
        if timeout_s is not None and timeout_s <= 0:
            raise DeadlineExceeded(
                "the time was up before all of the call was sent",
                target=self._pool.target,
                codebook=codebook,
            )
        message = request.message()
        connection = self._pool.pick(len(message), avoid=request.avoid, digest=self._digest)
        if connection is None:
            return
        request.connection = connection
        try:
            outgoing = Outgoing(request.method, message, timeout_s, request.request_id, self._trace)
            request.future = self._sender.send(connection, outgoing, alone=alone)
        except BaseException as error:
            connection.answered(len(message))
            if isinstance(error, ValueError) and self._pool.closed:
                raise self._closed() from error
            raise

    def _server(self, request: Request) -> str:
        return self._pool.target if request.connection is None else request.connection.target

    def _back_off(self, request: Request, future: ReplyFuture, codebook: str | None) -> None:
        """Set the time of the next attempt, or raise the error if there is none."""
        connection = request.connection
        if self._pool.closed or connection is None:
            raise self._closed()
        if isinstance(future, StreamFuture) and future.was_skipped:
            # Not an attempt of this request: the failure was counted for the request that failed.
            return
        request.failures += 1
        failure = Failure(
            future.code(),
            future.details() or "",
            text_metadata(future.trailing_metadata()),
            is_encrypted=self._pool.is_encrypted,
        )
        # A name such as localhost may have two addresses. The one where nothing listens may fail last, and says less.
        if request.failure is None or not (request.failure.is_misunderstood and failure.is_unsent):
            request.failure = failure
        if failure.is_retried:
            self._pool.failed(connection, failure)
        if self._other_server(request, connection, failure, codebook):
            request.failures -= 1
            return
        delay_s = self._delay_s(request, failure)
        if delay_s is None or delay_s >= self._deadline.remaining_s():
            error = self._error(request, request.failure, codebook)
            raise error if request.failures == 1 else error.noted(f"tried {request.failures} times")
        if failure.is_unsent:
            connection.renew()
        request.avoid = ()
        request.resume_at = time.monotonic() + delay_s

    def _error(self, request: Request, failure: Failure, codebook: str | None) -> VqserveError:
        # All servers were tried if the last one cannot be reached.
        target = self._server(request) if failure.is_answered else self._pool.target
        return request.explain(failure.error(target=target, codebook=codebook, request_id=request.request_id))

    def _other_server(self, request: Request, connection: Connection, failure: Failure, codebook: str | None) -> bool:
        """Return whether the request goes to another server at once, which is no retry: this one cannot answer it."""
        if failure.is_of_one_server and self._digest is not None:
            # While servers get a new codebook one after the other, the next one may have the one that is asked for.
            self._pool.leave_out(connection, self._digest, self._error(request, failure, codebook))
            request.others += 1
            return request.others <= _MOST_OTHERS and self._pool.has_other(request.avoid, self._digest)
        if not failure.is_retried or failure.error_class is Overloaded:
            return False
        request.avoid = {*request.avoid, connection.address.uri}
        return self._pool.has_other(request.avoid, self._digest)

    def _delay_s(self, request: Request, failure: Failure) -> float | None:
        """Return the seconds until the next attempt; None: there is none."""
        if failure.error_class is Unauthenticated and self._pool.has_token_file and request.failures == 1:
            # The token may have been replaced while the request was on its way.
            return self._policy.delay_s(1, None)
        if not failure.is_retried:
            return None
        delay_s = self._policy.delay_s(request.failures, failure.retry_after_s)
        if delay_s is not None and failure.error_class is Overloaded and self._pool.has_other((), self._digest):
            # It is one server that is overloaded, and asks for time.
            delay_s = 0.0
        if delay_s is None or not failure.is_answered:
            return delay_s
        # Only what a server has answered costs it anything.
        delay_s = max(delay_s, self._budget.spend())
        if delay_s >= self._deadline.remaining_s():
            self._budget.refund()
        return delay_s

    def _closed(self) -> Closed:
        return Closed("this client was closed during the call", target=self._pool.target)
