"""Many arrays on their way at once, their answers in order: `encode_many` without the waiting."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vqserve_client.calls import Options
from vqserve_client.core import CallOptions, Core, Operation, Wake
from vqserve_client.errors import Closed
from vqserve_client.exchange import Budget, Steps
from vqserve_client.retry import Deadline
from vqserve_client.stream import Streamed


class Lane:
    """A bounded window of calls under one pin and one budget of requests."""

    def __init__(self, core: Core, operation: Operation, asked: Options, call: CallOptions, wake: Wake) -> None:
        self._core = core
        self._operation = operation
        self._asked = asked
        self._call = call
        self._sender = Streamed(core.connection, wake)
        self._pin = core.pin(call)
        self._budget = Budget(core.config.window)
        self._jobs: deque[_Job] = deque()
        self._pid = os.getpid()

    @property
    def full(self) -> bool:
        """Return whether an answer must be taken before another array fits."""
        return len(self._jobs) >= self._core.config.window

    @property
    def empty(self) -> bool:
        """Return whether nothing is under way."""
        return not self._jobs

    @property
    def ready(self) -> bool:
        """Return whether the next answer in order, or its error, is there."""
        return bool(self._jobs) and self._jobs[0].done

    def put(self, array: object) -> None:
        """Add one more array; `advance` begins with it."""
        deadline = self._core.deadline(self._call)
        steps = self._core.turn(
            self._operation,
            array,
            self._asked,
            pin=self._pin,
            deadline=deadline,
            budget=self._budget,
            sender=self._sender,
        )
        self._jobs.append(_Job(steps, deadline))

    def advance(self) -> float | None:
        """Do what can be done; return the seconds until there is more unless a reply comes sooner.

        Raises:
            Closed: in a process that was forked after the lane began.
        """
        if os.getpid() != self._pid:
            raise Closed("this generator was begun in another process, before a fork", target=self._core.config.target)
        while True:
            given_back = self._budget.given_back
            waits = []
            for job in self._jobs:
                wait_s = job.advance()
                if wait_s is not None:
                    waits.append(wait_s)
                # The first array finds out which codebook is pinned; the others need not ask as well.
                if self._pin.info is None and not job.done:
                    break
            if self._budget.given_back == given_back:
                return min(waits, default=None)

    def take(self) -> Any:
        """Return the next answer in order, or raise its error."""
        return self._jobs.popleft().result()

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


class _Job:
    """The steps of one array, until they end in an answer or an error."""

    def __init__(self, steps: Steps[Any], deadline: Deadline) -> None:
        self.deadline = deadline
        self.done = False
        self._steps = steps
        self._value: Any = None
        self._error: Exception | None = None

    def advance(self) -> float | None:
        if self.done:
            return None
        try:
            return next(self._steps)
        except StopIteration as stop:
            self._value = stop.value
        except Exception as error:
            # Kept until its turn: the answers before it come first.
            self._error = error
        self.done = True
        return None

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._value

    def close(self) -> None:
        self._steps.close()
