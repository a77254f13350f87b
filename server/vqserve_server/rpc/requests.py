"""Requests on their way from the wire to the engine and back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from vqserve_server.engine import Engine, Job, Served
from vqserve_server.errors import VqserveError
from vqserve_server.rpc.call import Call
from vqserve_server.rpc.plan import Plan
from vqserve_server.rpc.plans import Plans

# Looking at so many bytes takes half a millisecond, for which the others can wait; handing them to another thread and
# back takes some of that, and a core.
_INLINE_BYTES = 2 << 20

T = TypeVar("T")


class Requests:
    """Takes requests in. Belongs to one event loop."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.loop = asyncio.get_running_loop()
        self._arrived: list[Job] = []
        # A large payload is read and checked off the event loop, so that it does not hold up the small ones.
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="vqserve-payload")

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def begin(self, plans: Plans[Any], raw: bytes, call: Call) -> Request:
        """Read a request, find it good and give it to the engine; its `leave` or `abandon` must follow.

        Raises:
            VqserveError: why not.
        """
        known = plans.known(raw)
        if known is None:
            known = await self._near(len(raw), lambda: plans.read(raw))
            plans.keep(raw, *known)
        plan, data = known
        request = Request(self, plan, call, len(raw) + plan.reply_bytes)
        try:
            if plan.rows:
                array = plan.array(data)
                await self._near(len(raw), lambda: plan.check(array))
                request.job = plan.job(array, deliver=self._deliver, tag=request.answer, deadline=call.deadline)
                # Whatever the loop has ready goes to the engine together.
                if not self._arrived:
                    self.loop.call_soon(self._submit)
                self._arrived.append(request.job)
        except BaseException:
            request.abandon()
            raise
        return request

    async def _near(self, nbytes: int, work: Callable[[], T]) -> T:
        """Do work on so many bytes: here if they are few, else on a thread."""
        if nbytes <= _INLINE_BYTES:
            return work()
        return await self.loop.run_in_executor(self._pool, work)

    def _submit(self) -> None:
        jobs, self._arrived = self._arrived, []
        try:
            self.engine.submit(jobs)
        except VqserveError as error:
            for job in jobs:
                job.fail(type(error)(*error.args))

    def _deliver(self, jobs: list[Job]) -> None:
        # From the device's thread, with one wake-up of the loop for all jobs of a batch.
        self.loop.call_soon_threadsafe(_hand_over, jobs)


class Request:
    """A good request, in the server from `begin` until `leave` or `abandon`.

    Attributes:
        nbytes: of the request and its reply's payload.
        answer: resolved when the engine is done with it.
        job: None if there is nothing to compute.
    """

    def __init__(self, requests: Requests, plan: Plan[Any], call: Call, nbytes: int) -> None:
        """Enter.

        Raises:
            Overloaded, Draining, DeviceBroken: the server takes no more.
        """
        requests.engine.admit(plan.rows, nbytes)
        self.nbytes = nbytes
        self.answer: asyncio.Future[Served] = requests.loop.create_future()
        self.job: Job | None = None
        self._requests = requests
        self._plan = plan
        self._call = call

    async def reply(self) -> bytes:
        """Return the reply.

        Raises:
            VqserveError: what went wrong.
        """
        try:
            if self.job is None:
                return self._plan.empty_reply
            return self._plan.reply(self.job, await self.answer, self._call.elapsed_us())
        except asyncio.CancelledError:
            # The caller has left or its deadline has passed.
            self._forget()
            raise

    def leave(self) -> None:
        """Leave: the reply is sent, or there is none. A caller who does not read must not make the server grow."""
        self._requests.engine.release(self._plan.rows, self.nbytes)

    def abandon(self) -> None:
        """Leave without a reply."""
        self._forget()
        self.leave()

    def _forget(self) -> None:
        if self.job is not None:
            self._requests.engine.forget(self.job)


def _hand_over(jobs: list[Job]) -> None:
    for job in jobs:
        answer, outcome = job.tag, job.outcome
        if answer.done():
            continue
        if isinstance(outcome, BaseException):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)
