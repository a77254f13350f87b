"""Many arrays in flight at once, their answers in order: `encode_many` without the waiting.

A request costs the same work whether its array is small or not. So while one is in flight, small arrays that come are
gathered, and go as one request when they fill it, or when nothing else is in flight. A source that is slower than the
server never waits for that; one that is faster pays for few requests.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from vqserve_client.arrays import Given
from vqserve_client.calls import Options
from vqserve_client.core import CallOptions, Core, Operation, Wake
from vqserve_client.errors import Closed, InvalidArgument, VqserveClientError
from vqserve_client.requests import Budget, Deadline, Steps
from vqserve_client.transport import LARGEST_STREAMED_BYTES, Streamed

Turn = Callable[[Sequence[Given]], Steps[list[Any]]]

# Of the request and of the reply of arrays that go as one, and so many of them: they are taken ahead.
JOINED_BYTES = LARGEST_STREAMED_BYTES
MOST_JOINED = 64


class Lane:
    """A bounded window of calls under one pin and one budget of requests.

    Attributes:
        ended: whether no more arrays come.
    """

    def __init__(self, core: Core, operation: Operation, asked: Options, call: CallOptions, wake: Wake) -> None:
        self._core = core
        self._operation = operation
        self._asked = asked
        self._call = call
        self._wake = wake
        self._sender = Streamed(core.connection, self._stir)
        self._pin = core.pin(call)
        self._window = core.config.window
        self._budget = Budget(self._window)
        self._jobs: deque[_Job] = deque()
        self.ended = False
        self._stirred = False
        self._due_at = math.inf
        self._failure: Exception | None = None
        self._pid = os.getpid()

    @property
    def stirred(self) -> bool:
        """Return whether `advance` may have something to do; to look costs more than to add an array."""
        return self._stirred or time.monotonic() >= self._due_at

    @property
    def full(self) -> bool:
        """Return whether an answer must be taken before another array fits."""
        beyond = len(self._jobs) - self._window
        if beyond < 0:
            return False
        last = self._jobs[-1]
        # One array at a time is what a window of one is for: its source may need each answer.
        return self._window == 1 or beyond > 1 or not last.takes_more or (last.begun and beyond > 0)

    @property
    def empty(self) -> bool:
        """Return whether nothing is under way."""
        return not self._jobs and self._failure is None

    @property
    def ready(self) -> bool:
        """Return whether the next answer in order, or its error, is there."""
        return self._jobs[0].ready if self._jobs else self._failure is not None

    def put(self, array: object) -> None:
        """Add one more array, which `advance` begins with when there is a place for it.

        Raises:
            TypeError: it is no array.
            InvalidArgument: its elements do not travel.
        """
        last = self._jobs[-1] if self._jobs else None
        given = self._operation.read(array)
        if last is None or not last.add(given):
            deadline = self._core.deadline(self._call)
            self._jobs.append(_Job(given, deadline, partial(self._turn, deadline), room=self._room(given)))
        self._stirred = self._stirred or self._is_due(self._jobs[-1])

    def advance(self) -> float | None:
        """Do what can be done; return the seconds until there is more unless a reply comes sooner.

        Raises:
            Closed: in a process that was forked after the lane began.
        """
        self._check_process()
        # Before the look: what comes during it is seen in it or next time.
        self._stirred = False
        self._due_at = math.inf
        while True:
            given_back = self._budget.given_back
            waits = []
            for job in self._jobs:
                if not job.begun and not self._is_due(job):
                    break
                wait_s = job.advance()
                if wait_s is not None:
                    waits.append(wait_s)
                # The first array finds out which codebook is pinned; the others need not ask as well.
                if self._pin.info is None and not job.done:
                    break
            if self._budget.given_back == given_back:
                wait_s = min(waits, default=None)
                if wait_s is not None:
                    self._due_at = time.monotonic() + wait_s
                return wait_s

    def end(self, failure: Exception | None = None) -> None:
        """Say that no more arrays come, because of a failure perhaps, which comes after the answers before it."""
        self.ended = self._stirred = True
        self._failure = failure

    def take(self) -> Any:
        """Return the next answer in order, or raise its error."""
        self._check_process()
        if self._failure is not None and not self._jobs:
            raise self._failure
        answer = self._jobs[0].take()
        if self._jobs[0].spent:
            self._jobs.popleft()
        return answer

    @contextmanager
    def standstill(self) -> Iterator[None]:
        """Stop the clock of what is under way while the caller has the say, for nobody then sends or retries."""
        began = time.monotonic()
        try:
            yield
        finally:
            for job in self._jobs:
                job.deadline.extend(time.monotonic() - began)

    def close(self) -> None:
        """Cancel what is under way."""
        while self._jobs:
            self._jobs.pop().close()
        if os.getpid() == self._pid:
            self._sender.close()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise Closed("this generator was begun in another process, before a fork", target=self._core.config.target)

    def _stir(self) -> None:
        self._stirred = True
        self._wake()

    def _is_due(self, job: _Job) -> bool:
        """Return whether a job that is not begun should be."""
        if self._budget.free <= 0:
            return False
        may_grow = job is self._jobs[-1] and job.takes_more and not self.ended
        return not may_grow or self._budget.free == self._window

    def _turn(self, deadline: Deadline, givens: Sequence[Given]) -> Steps[list[Any]]:
        return self._core.turn(
            self._operation,
            givens,
            self._asked,
            pin=self._pin,
            deadline=deadline,
            budget=self._budget,
            sender=self._sender,
        )

    def _room(self, given: Given) -> int:
        """Return how many steps of its first axis such an array and those that join it may have together."""
        info, config = self._pin.info, self._core.config
        if info is None or given.array.nbytes > JOINED_BYTES:
            return 0
        try:
            call = self._operation.call(given, info, self._asked, pin=self._pin, config=config)
        except InvalidArgument:
            # Raised again in its turn.
            return 0
        return call.steps_within(min(JOINED_BYTES, config.max_message_bytes))


class _Job:
    """Arrays that go as one, until they have their answers or one of them has failed.

    Attributes:
        deadline: of the one that has waited longest.
        begun: whether they are under way: no more can be added.
        done: whether nothing more will come.
    """

    def __init__(self, given: Given, deadline: Deadline, turn: Turn, *, room: int) -> None:
        self.deadline = deadline
        self.begun = self.done = False
        self._givens = [given]
        self._turn = turn
        self._room = room - len(given.array) if given.array.ndim else 0
        self._steps = self._run()
        self._answers: deque[Any] = deque()
        self._error: Exception | None = None

    @property
    def takes_more(self) -> bool:
        """Return whether another array like the last would fit beside it, were it not begun."""
        return len(self._givens) < MOST_JOINED and 0 < self._room >= len(self._givens[-1].array)

    @property
    def ready(self) -> bool:
        """Return whether there is an answer to take, or an error."""
        return bool(self._answers) or self._error is not None

    @property
    def spent(self) -> bool:
        """Return whether all that there was has been taken."""
        return self.done and not self.ready

    def add(self, given: Given) -> bool:
        """Take one more array, if it can go with those that are here."""
        if self.begun or not self.takes_more or not self._givens[-1].joins(given) or len(given.array) > self._room:
            return False
        self._givens.append(given)
        self._room -= len(given.array)
        return True

    def fail(self, error: Exception) -> None:
        """End with an error, which is kept until its turn: the answers before it come first."""
        self.begun = self.done = True
        self._error = error

    def advance(self) -> float | None:
        """Do what can be done; return the seconds until there is more unless a reply comes sooner."""
        if self.done:
            return None
        self.begun = True
        try:
            return next(self._steps)
        except StopIteration:
            self.done = True
        except Exception as error:
            self.fail(error)
        return None

    def take(self) -> Any:
        """Return the next answer, or raise the error."""
        if self._error is not None and not self._answers:
            raise self._error
        return self._answers.popleft()

    def close(self) -> None:
        """Cancel what is under way."""
        self._steps.close()

    def _run(self) -> Steps[None]:
        if len(self._givens) > 1:
            try:
                self._answers.extend((yield from self._turn(self._givens)))
            except InvalidArgument:
                # Something is wrong with one of them: alone it says what and where, and the others get their answers.
                pass
            else:
                return
        for given in self._givens:
            self._answers.extend((yield from self._turn([given])))


class Numbered:
    """A lane's arrays, numbered from 0 as they are put and as their answers are taken."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._put = self._taken = 0

    def put(self, array: object) -> None:
        """Add one more array; see Lane.put."""
        try:
            self._lane.put(array)
        except VqserveClientError as error:
            error.item = self._put
            raise
        except TypeError as error:
            raise TypeError(f"{error} (array {self._put}, counting from 0)") from None
        self._put += 1

    def take(self) -> Any:
        """Return the next answer in order, or raise its error; see Lane.take."""
        try:
            answer = self._lane.take()
        except VqserveClientError as error:
            error.item = self._taken
            raise
        self._taken += 1
        return answer
