"""Many arrays in flight at once, their results in order: `encode_many` without the waiting.

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

from vqserve.errors import Closed, InvalidArgument, VqserveError
from vqserve.many import concerns_one_array, keyed, with_key
from vqserve_client.arrays import ArrayInput
from vqserve_client.config import CallOptions
from vqserve_client.core import Core, Operation, Wake, without_frames
from vqserve_client.requests import Deadline, Steps, Window
from vqserve_client.transport import LARGEST_STREAMED_BYTES, StreamSender

Convert = Callable[[Sequence[ArrayInput]], Steps[list[Any]]]

# Limits of a joined request: bytes of the request and of the reply, and number of arrays, because they are read ahead.
JOINED_BYTES = LARGEST_STREAMED_BYTES
MOST_JOINED = 64


class Pipeline:
    """Arrays in a bounded window of calls, all pinned to one codebook and within one window of requests.

    Attributes:
        ended: whether no more arrays come.
        source_failure: the error that the caller's iterator raised; None if it raised none.
        failed: whether the whole call has failed and errors are returned: `take` gives the error in the place of each
            result that is missing, and then raises it.
    """

    def __init__(self, core: Core, operation: Operation, options: CallOptions, wake: Wake) -> None:
        self._core = core
        self._operation = operation
        self._options = options
        self._wake = wake
        self._sender = StreamSender(self._on_reply)
        self._pin = core.pin(options)
        self._size = core.pool.window
        self._window = Window(self._size)
        self._groups: deque[_Group] = deque()
        self.ended = False
        self.source_failure: Exception | None = None
        self.failed = False
        # Whether something has changed since `advance` looked last, and when it must look again in any case.
        self._changed = False
        self._due_at = math.inf
        self._failure: Exception | None = None
        self._pid = os.getpid()
        self._num_put = self._num_taken = 0

    @property
    def is_due(self) -> bool:
        """Return whether `advance` may have work; to call it costs more than to add an array."""
        return self._changed or time.monotonic() >= self._due_at

    @property
    def full(self) -> bool:
        """Return whether a result must be taken before another array fits."""
        beyond = len(self._groups) - self._size
        if beyond < 0:
            return False
        last = self._groups[-1]
        # With a window of one, arrays go one at a time: their source may need each result.
        return self._size == 1 or beyond > 1 or not last.takes_more or (last.begun and beyond > 0)

    @property
    def empty(self) -> bool:
        """Return whether nothing is left to take."""
        return not self._groups and self._failure is None

    @property
    def ready(self) -> bool:
        """Return whether the next result in order, or its error, is there."""
        return self._groups[0].ready if self._groups else self._failure is not None

    def put(self, item: object) -> None:
        """Add one more array, or a pair of a key and an array; `advance` sends it when the window has a place.

        `take` raises the error of a wrong array after the results of the arrays before it, or returns it in its place.
        """
        key, array = keyed(item)
        if self.failed:
            self._put_error(key, self._failure)
            return
        try:
            self._put(key, array)
        except VqserveError as error:
            if self._is_returned(error):
                self._put_error(key, error)
            else:
                self._fail(error)
        except Exception as error:
            self._fail(error)
        self._num_put += 1

    def _put(self, key: object, array: object) -> None:
        try:
            source = self._operation.read(array)
            if not self._options.batched:
                source = source.with_batch_axis()
        except VqserveError as error:
            error.item = self._num_put
            raise
        last = self._groups[-1] if self._groups else None
        if last is None or not last.joins(source):
            last = self._new_group(room=self._steps_that_join(source))
            self._groups.append(last)
        last.put(key, source)
        self._changed = self._changed or self._may_begin(last)

    def _put_error(self, key: object, error: Exception | None) -> None:
        group = self._new_group(room=0)
        group.put_error(key, error)
        self._groups.append(group)

    def _new_group(self, *, room: int) -> _Group:
        deadline = self._core.deadline(self._options)
        return _Group(deadline, partial(self._convert, deadline), room=room, is_returned=self._is_returned)

    def advance(self) -> float | None:
        """Send what fits the window, receive replies; return the seconds until the next call (None: a reply).

        Raises:
            Closed: in a process that was forked after the pipeline began.
        """
        self._check_process()
        self._widen()
        # Cleared first, so that a reply that arrives during this is seen now or next time.
        self._changed = False
        self._due_at = math.inf
        while True:
            released = self._window.released
            waits = []
            for group in self._groups:
                if not group.begun and not self._may_begin(group):
                    break
                wait_s = group.advance()
                if group.error is not None and self._options.on_error == "return":
                    self._fail_as_a_whole(group.error)
                    return None
                if wait_s is not None:
                    waits.append(wait_s)
                # The first array finds out which codebook is pinned; the others need not request the list too.
                if self._pin.info is None and not group.done:
                    break
            if self._window.released == released:
                wait_s = min(waits, default=None)
                if wait_s is not None:
                    self._due_at = time.monotonic() + wait_s
                return wait_s

    def end(self, failure: Exception | None = None) -> None:
        """Take no more arrays.

        Args:
            failure: what the caller's iterator raised; `take` raises it after the results of the arrays before it.
        """
        if not self.failed:
            self.source_failure = failure
            self._fail(failure)

    def take(self) -> Any:
        """Return the next result in order, or raise its error, whose `item` is the number of the array."""
        self._check_process()
        if self._failure is not None and not self._groups:
            raise self._failure
        try:
            key, result = self._groups[0].take()
        except VqserveError as error:
            error.item = self._num_taken
            raise
        if isinstance(result, VqserveError):
            # A copy: the error of the whole call stands for several arrays.
            result = without_frames(result).with_fields(item=self._num_taken)
        self._num_taken += 1
        if self._groups[0].spent:
            self._groups.popleft()
        return with_key(key, result)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pause the deadlines while the caller's code runs: nothing is sent or retried meanwhile."""
        began = time.monotonic()
        try:
            yield
        finally:
            for group in self._groups:
                group.deadline.extend(time.monotonic() - began)

    def close(self) -> None:
        """Cancel the requests in flight."""
        while self._groups:
            self._groups.pop().close()
        if os.getpid() == self._pid:
            self._sender.close()

    def _fail(self, failure: Exception | None) -> None:
        self.ended = self._changed = True
        self._failure = failure

    def _fail_as_a_whole(self, error: Exception) -> None:
        """Let an error stand for each result that is missing, and end the call."""
        self._fail(error)
        if isinstance(error, VqserveError):
            self.failed = True
            for group in self._groups:
                group.give_up(error)

    def _is_returned(self, error: VqserveError) -> bool:
        """Return whether an error is about one array and takes the place of its result."""
        return self._options.on_error == "return" and concerns_one_array(error, answered=self._pin.answered)

    def _widen(self) -> None:
        """Let more requests be in flight when servers have joined."""
        more = self._core.pool.window - self._size
        if more > 0:
            self._size += more
            self._window.release(more)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise Closed("this generator was begun in another process, before a fork", target=self._core.config.target)

    def _on_reply(self) -> None:
        self._changed = True
        self._wake()

    def _may_begin(self, group: _Group) -> bool:
        """Return whether a group that has not begun should begin now."""
        if self._window.free <= 0:
            return False
        may_grow = group is self._groups[-1] and group.takes_more and not self.ended
        return not may_grow or self._window.free == self._size

    def _convert(self, deadline: Deadline, inputs: Sequence[ArrayInput]) -> Steps[list[Any]]:
        return self._core.convert(
            self._operation,
            inputs,
            self._options,
            pin=self._pin,
            deadline=deadline,
            window=self._window,
            sender=self._sender,
        )

    def _steps_that_join(self, source: ArrayInput) -> int:
        """Return how many steps of its first axis this array and those that join it may have together."""
        info, config = self._pin.info, self._core.config
        if info is None or source.array.nbytes > JOINED_BYTES:
            return 0
        try:
            form = self._core.form(self._operation, source, info, self._options)
        except InvalidArgument:
            # It is raised again when the array is converted.
            return 0
        return form.steps_within(min(JOINED_BYTES, config.max_message_bytes))


class _Group:
    """Arrays that go as one, until all have their results or one of them has failed.

    Attributes:
        deadline: deadline of the array that has waited longest.
        begun: whether they are in flight: no more can be added.
        done: whether no more results come.
        error: why some of them have no result.
    """

    def __init__(
        self, deadline: Deadline, convert: Convert, *, room: int, is_returned: Callable[[VqserveError], bool]
    ) -> None:
        """Make an empty group.

        Args:
            deadline: deadline of the array that is put next.
            convert: encodes or decodes arrays.
            room: how many steps of the first axis fit.
            is_returned: whether an error takes the place of the one result that is missing because of it.
        """
        self.deadline = deadline
        self.begun = self.done = False
        self.error: Exception | None = None
        self._inputs: list[ArrayInput] = []
        self._keys: deque[object] = deque()
        self._convert = convert
        self._room = room
        self._is_returned = is_returned
        self._steps = self._run()
        self._results: deque[Any] = deque()

    @property
    def takes_more(self) -> bool:
        """Return whether there is room for another array like the last, before the group begins."""
        return 0 < self._room >= len(self._inputs[-1].array) and len(self._inputs) < MOST_JOINED

    @property
    def ready(self) -> bool:
        """Return whether there is a result to take, or an error."""
        return bool(self._results) or self.error is not None

    @property
    def spent(self) -> bool:
        """Return whether all results have been taken."""
        return self.done and not self.ready

    def joins(self, source: ArrayInput) -> bool:
        """Return whether one more array can go with the others."""
        if self.begun or not self.takes_more:
            return False
        return self._inputs[-1].joins(source) and len(source.array) <= self._room

    def put(self, key: object, source: ArrayInput) -> None:
        """Add an array, the first or one that joins the others."""
        self._inputs.append(source)
        self._keys.append(key)
        if source.array.ndim:
            self._room -= len(source.array)

    def put_error(self, key: object, error: Exception | None) -> None:
        """Add an array that is not sent, with the error that takes the place of its result."""
        self.begun = self.done = True
        self._keys.append(key)
        self._results.append(error)

    def advance(self) -> float | None:
        """Send what fits the window, receive replies; return the seconds until the next call (None: a reply)."""
        if self.done:
            return None
        self.begun = True
        try:
            return next(self._steps)
        except StopIteration:
            self.done = True
        except Exception as error:
            # Kept until `take`: the results before it come first.
            self.done = True
            self.error = error
        return None

    def take(self) -> tuple[object, Any]:
        """Return the key and the result of the next array, or raise the error."""
        if self.error is not None and not self._results:
            raise self.error
        return self._keys.popleft(), self._results.popleft()

    def give_up(self, error: VqserveError) -> None:
        """Cancel the requests in flight, and let the error take the place of each result that is missing."""
        self.close()
        self.begun = self.done = True
        self.error = None
        self._results.extend([error] * (len(self._keys) - len(self._results)))

    def close(self) -> None:
        """Cancel the requests in flight."""
        self._steps.close()

    def _run(self) -> Steps[None]:
        if len(self._inputs) > 1:
            try:
                self._results.extend((yield from self._convert(self._inputs)))
            except VqserveError as error:
                # One of them is at fault. Alone, its error says what and where, and the others get their results.
                if not (isinstance(error, InvalidArgument) or self._is_returned(error)):
                    raise
            else:
                return
        for source in self._inputs:
            try:
                self._results.extend((yield from self._convert([source])))
            except VqserveError as error:
                if not self._is_returned(error):
                    raise
                self._results.append(error)
