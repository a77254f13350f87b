"""Requests on their way from the wire to the engine and back."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

from vqserve_server.engine import Engine, Job
from vqserve_server.errors import Draining
from vqserve_server.rpc.headers import Plan, Plans
from vqserve_server.rpc.transport import Call, fail, no_request

# Looking at so many bytes takes half a millisecond, for which the others can wait; handing them to another thread takes
# some of that, and a core.
_INLINE_BYTES = 2 << 20

logger = logging.getLogger(__name__)

Told: TypeAlias = Callable[[], None]
# Takes a good request, and says who is told when it is answered; None: it is no longer wanted.
Accept: TypeAlias = "Callable[[Request], Told | None]"
# Is told why a request is not good. One of the two is called, on whatever thread.
Refuse: TypeAlias = Callable[[Exception], None]
Begin: TypeAlias = Callable[[bytes, Call, Accept, Refuse], None]


class Requests:
    """Takes requests in."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # A large payload is read and checked elsewhere, so that it does not hold up the small ones.
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="vqserve-payload")

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def begin(self, plans: Plans[Any], raw: bytes, call: Call, accept: Accept, refuse: Refuse) -> None:
        """Read a request, find it good and give it to the engine.

        Args:
            plans: of its method.
            raw: the message.
            call: on which it came.
            accept: gets a good request before the engine does.
            refuse: gets the VqserveError of any other.
        """
        arrived = time.monotonic()
        if len(raw) <= _INLINE_BYTES:
            self._begin(plans, raw, call, accept, refuse, arrived=arrived)
            return
        try:
            self._pool.submit(self._begin, plans, raw, call, accept, refuse, arrived=arrived)
        except RuntimeError:
            refuse(Draining("the server is stopping"))

    def _begin(
        self, plans: Plans[Any], raw: bytes, call: Call, accept: Accept, refuse: Refuse, *, arrived: float
    ) -> None:
        try:
            known = plans.known(raw)
            if known is None:
                known = plans.read(raw)
                plans.keep(raw, *known)
            plan, data = known
            request = Request(self._engine, plan, arrived, len(raw) + plan.reply_bytes)
            try:
                if plan.rows:
                    array = plan.array(data)
                    plan.check(array)
                    request.job = plan.job(array, deliver=_deliver, deadline=call.deadline)
            except BaseException:
                request.leave()
                raise
        except Exception as error:
            refuse(error)
            return
        told = accept(request)
        if told is None:
            request.leave()
        else:
            request.start(told)


class Request:
    """A good request, in the server until `leave`.

    Attributes:
        nbytes: of the request and its reply's payload.
        job: None if there is nothing to compute.
    """

    def __init__(self, engine: Engine, plan: Plan[Any], arrived: float, nbytes: int) -> None:
        """Enter.

        Raises:
            Overloaded, Draining, DeviceBroken: the server takes no more.
        """
        engine.admit(plan.rows, nbytes)
        self.nbytes = nbytes
        self.job: Job | None = None
        self._engine = engine
        self._plan = plan
        self._arrived = arrived

    @property
    def is_answered(self) -> bool:
        """Return whether `reply` has something to say."""
        return self.job is None or self.job.outcome is not None

    def start(self, told: Told) -> None:
        """Give it to the engine; `told` is called once, from whatever thread, when `reply` has something to say."""
        if self.job is None:
            told()
            return
        self.job.tag = told
        try:
            self._engine.submit((self.job,))
        except Exception as error:
            self.job.fail(error)

    def reply(self) -> bytes:
        """Return the reply.

        Raises:
            VqserveError: what went wrong.
        """
        if self.job is None:
            return self._plan.empty_reply
        outcome = self.job.outcome
        if outcome is None:
            raise RuntimeError("the request is not answered yet")
        if isinstance(outcome, BaseException):
            raise outcome
        return self._plan.reply(self.job, outcome, round((time.monotonic() - self._arrived) * 1e6))

    def leave(self) -> None:
        """Leave: the reply is sent, or nobody wants it. A caller who does not read must not make the server grow."""
        if self.job is not None and self.job.outcome is None:
            self._engine.forget(self.job)
        self._engine.release(self._plan.rows, self.nbytes)


def _deliver(jobs: list[Job]) -> None:
    for job in jobs:
        try:
            job.tag()
        except Exception:
            # A thread of the engine's must not die of one caller's connection.
            logger.exception("a reply was not sent")


# Held to set and read a few fields only, so that one serves all calls.
_fields = threading.Lock()


class Unary:
    """Waits for the request, begins with it, and ends the call with the reply."""

    def __init__(self, call: Call, begin: Begin, *, when_over: Callable[[], None]) -> None:
        """Take the call; `when_over` is called when it has ended."""
        self._call = call
        self._begin = begin
        self._when_over = when_over
        self._request: Request | None = None
        self._is_over = False
        call.when_over = self._over

    def start(self) -> None:
        """Begin to wait."""
        self._call.receive(self._received)

    def _received(self, raw: bytes | None) -> None:
        if raw is None:
            fail(self._call, no_request())
        else:
            self._begin(raw, self._call, self._begun, self._failed)

    def _begun(self, request: Request) -> Told | None:
        with _fields:
            if self._is_over:
                return None
            self._request = request
        return self._answered

    def _answered(self) -> None:
        request = self._request
        if request is None:
            return
        try:
            reply = request.reply()
        except Exception as error:
            self._failed(error)
        else:
            self._call.end(message=reply)

    def _failed(self, error: Exception) -> None:
        fail(self._call, error)

    def _over(self) -> None:
        with _fields:
            self._is_over = True
            request, self._request = self._request, None
        if request is not None:
            request.leave()
        self._when_over()
