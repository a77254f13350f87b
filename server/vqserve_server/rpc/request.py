"""Requests on their way from the wire to the engine and back."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

from vqserve import wire
from vqserve.errors import Draining, Overloaded, VqserveError
from vqserve_server.access import Token
from vqserve_server.engine import Caller, Engine, Job
from vqserve_server.process import trim_memory
from vqserve_server.rpc.call import Call
from vqserve_server.rpc.headers import HeaderCache, RequestHeader

# Larger messages are validated on another thread. Validating this many bytes takes half a millisecond; the change of
# thread takes a part of that, and needs another core.
_INLINE_BYTES = 2 << 20

# After a large message or reply the server keeps what it freed for so long: another one probably follows.
_TRIM_AFTER_S = 2.0

# Guards the fields of all unary calls; it is held for a few operations only.
_fields = threading.Lock()


class Recipient(Protocol):
    """The call that waits for the reply of a request. Its methods may be called on any thread.

    Either `rejected` is called, or `accepted` and after it `ready`.
    """

    @property
    def caller(self) -> Caller:
        """Who made the call."""

    @property
    def deadline(self) -> float | None:
        """time.monotonic() seconds, or None."""

    def accepted(self, request: Request) -> bool:
        """Take over a valid request before it is queued; return False if the caller has left."""

    def ready(self) -> None:
        """React to a request whose `reply` can be called."""

    def rejected(self, error: Exception, held: int) -> None:
        """React to a request that is not valid, or for which the server has no capacity.

        Args:
            error: why.
            held: bytes that the admission holds for the message; the recipient must let go of them.
        """


class Requests:
    """Validates requests and queues them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # Large payloads are validated here, so that they do not delay small requests.
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="vqserve-payload")
        # When the last large one was in the server, in time.monotonic() seconds; None: its memory is given back.
        self._large_at: float | None = None

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def start(self, recipient: Recipient, headers: HeaderCache[Any], raw: bytes, *, held: int = 0) -> None:
        """Validate a request and queue it, here or, if it is large, on another thread.

        Args:
            recipient: call that waits for the reply.
            headers: known headers of the method.
            raw: the message.
            held: bytes that the admission holds for it already.
        """
        received_at = time.monotonic()
        if len(raw) <= _INLINE_BYTES:
            self._start(recipient, headers, raw, received_at, held)
            return
        self._large_at = received_at
        try:
            # It counts while it waits for a thread; what the server has no room for is dropped here.
            if len(raw) > held:
                self._engine.admission.hold(recipient.caller, len(raw) - held)
                held = len(raw)
        except VqserveError as error:
            recipient.rejected(error, held)
            return
        try:
            self._pool.submit(self._start, recipient, headers, raw, received_at, held)
        except RuntimeError:
            recipient.rejected(Draining("the server is stopping"), held)

    def give_memory_back(self) -> None:
        """Give free memory back to the system, on another thread, if large requests were here and are no more.

        Call it now and then.
        """
        if self._large_at is None or time.monotonic() - self._large_at < _TRIM_AFTER_S:
            return
        if self._engine.admission.bytes < _INLINE_BYTES:
            self._large_at = None
            with contextlib.suppress(RuntimeError):
                self._pool.submit(trim_memory)

    def try_hold(self, caller: Caller, nbytes: int) -> bool:
        """Count bytes of a caller before they are an accepted request, if there is room for them."""
        return self._engine.admission.try_hold(caller, nbytes)

    def let_go(self, caller: Caller, nbytes: int) -> None:
        """Count bytes no longer that are held."""
        if nbytes:
            self._engine.admission.let_go(caller, nbytes)

    def _start(
        self, recipient: Recipient, headers: HeaderCache[Any], raw: bytes, received_at: float, held: int
    ) -> None:
        try:
            token = recipient.caller.token
            # Also for each message of a stream: the token may have been revoked meanwhile.
            codebooks = None if token is None else token.check().codebooks
            header, data = headers.find(raw, codebooks)
            if header.rows:
                self._engine.scheduler.check(recipient.caller, header.key, header.rows, recipient.deadline)
            nbytes = len(raw) + header.reply_bytes
            request = Request(self._engine, recipient.caller, header, nbytes, received_at, held=held)
            held = 0
            if nbytes > _INLINE_BYTES:
                self._large_at = received_at
            try:
                if header.rows:
                    request.job, request.buffer = header.job(
                        data, caller=recipient.caller, on_done=recipient.ready, deadline=recipient.deadline
                    )
            except BaseException:
                request.release()
                raise
        except Exception as error:
            recipient.rejected(error, held)
            return
        if not recipient.accepted(request):
            request.release()
        elif request.job is None:
            recipient.ready()
        else:
            try:
                self._engine.scheduler.put(request.job)
            except Exception as error:
                request.job.resolve(error)


class Request:
    """A valid request, counted by the admission until `release`.

    Attributes:
        nbytes: size of the request and of the payload of its reply.
        job: None if there is nothing to compute.
        buffer: the reply that the job writes.
    """

    job: Job | None = None
    buffer: wire.ReplyBuffer | None = None

    def __init__(
        self,
        engine: Engine,
        caller: Caller,
        header: RequestHeader[Any],
        nbytes: int,
        received_at: float,
        *,
        held: int = 0,
    ) -> None:
        """Enter the admission, which holds `held` bytes for the request and then no longer does.

        Raises:
            Overloaded, Draining, DeviceBroken: the server accepts no more.
        """
        token = caller.token
        if token is None:
            engine.admission.enter(caller, header.rows, nbytes, held)
        else:
            _enter_at_rate(engine, caller, token, header.rows, nbytes, held=held)
        self.nbytes = nbytes
        self._engine = engine
        self._caller = caller
        self._header = header
        self._received_at = received_at

    @property
    def is_ready(self) -> bool:
        """Whether `reply` can be called."""
        return self.job is None or self.job.outcome is not None

    def reply(self) -> bytes:
        """Return the reply.

        Raises:
            VqserveError: the request failed.
        """
        if self.job is None or self.buffer is None:
            return self._header.empty_reply
        timing = self.job.outcome
        if timing is None:
            raise RuntimeError("the request is not answered yet")
        if isinstance(timing, BaseException):
            raise timing
        total_us = round((time.monotonic() - self._received_at) * 1e6)
        # In the order of the fields of ServedStats.
        return self.buffer.write_header(
            (timing.queue_us, timing.compute_us, total_us, timing.batch_requests, timing.batch_rows)
        )

    def release(self) -> None:
        """Stop counting the request, after its reply is sent or its caller has left."""
        if self.job is not None and self.job.outcome is None:
            self._engine.scheduler.cancel(self.job)
        self._engine.admission.leave(self._caller, self._header.rows, self.nbytes)


def _enter_at_rate(engine: Engine, caller: Caller, token: Token, rows: int, nbytes: int, *, held: int) -> None:
    rate = token.rate
    if rate is None:
        engine.admission.enter(caller, rows, nbytes, held)
        return
    try:
        rate.take(rows)
    except Overloaded:
        engine.stats.count_refused("caller_rate")
        raise
    try:
        engine.admission.enter(caller, rows, nbytes, held)
    except BaseException:
        rate.give_back(rows)
        raise


class UnaryCall:
    """A call with one request and one reply: receive, start the request, send."""

    def __init__(
        self, call: Call, requests: Requests, headers: HeaderCache[Any], *, on_close: Callable[[], None]
    ) -> None:
        """Wait for the request; `on_close` is called when the call has ended."""
        self.caller = call.caller
        self.deadline = call.deadline
        self._call = call
        self._requests = requests
        self._on_close = on_close
        self._request: Request | None = None
        self._is_closed = False
        call.on_close = self._closed
        call.receive(partial(requests.start, self, headers))

    def accepted(self, request: Request) -> bool:
        """Take over a valid request; return False if the call has ended."""
        with _fields:
            if self._is_closed:
                return False
            self._request = request
        return True

    def ready(self) -> None:
        """Send the reply."""
        request = self._request
        if request is None:
            return
        try:
            reply = request.reply()
        except Exception as error:
            self._call.fail(error)
        else:
            self._call.end(message=reply)

    def rejected(self, error: Exception, held: int) -> None:
        """End the call with the error."""
        self._requests.let_go(self.caller, held)
        self._call.fail(error)

    def _closed(self) -> None:
        with _fields:
            self._is_closed = True
            request, self._request = self._request, None
        if request is not None:
            request.release()
        self._on_close()
