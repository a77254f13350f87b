"""Requests on their way from the wire to the engine and back."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import grpc

from vqserve import wire
from vqserve.errors import Draining, Overloaded, VqserveError
from vqserve_server.access import Token
from vqserve_server.engine import Caller, Engine, Job, RequestTiming
from vqserve_server.metrics.recorder import FailedRequests
from vqserve_server.process import trim_memory
from vqserve_server.rpc.call import Call
from vqserve_server.rpc.headers import HeaderCache, RequestHeader
from vqserve_server.rpc.status import code_of

if TYPE_CHECKING:
    from vqserve_server.rpc.tracing import CallTrace, Tracing

# Larger messages are validated on another thread. Validating this many bytes takes half a millisecond; the change of
# thread takes a part of that, and needs another core.
_INLINE_BYTES = 2 << 20

# After a large message or reply the server keeps what it freed for so long: another one probably follows.
_TRIM_AFTER_S = 2.0

# A caller that leaves so shortly before its deadline leaves because of it.
_EARLY_S = 0.1
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

    @property
    def trace(self) -> CallTrace | None:
        """Makes the spans of its requests; None: it is not traced."""

    def accepted(self, request: Request) -> bool:
        """Take over a valid request before it is queued; return False if the caller has left."""

    def ready(self) -> None:
        """React to a request whose `reply` can be called."""

    def rejected(self, rejection: Rejection) -> None:
        """React to a request that is not valid, or for which the server has no capacity, and count it."""


class Rejection(NamedTuple):
    """A request that is not valid, or for which the server has no capacity.

    Attributes:
        error: why.
        held: bytes that the admission holds for the message; the recipient must let go of them.
        metrics: where it is counted, if it does not start again.
        nbytes: size of the message.
        received_at: when the message was there, in time.monotonic() seconds.
    """

    error: Exception
    held: int
    metrics: FailedRequests
    nbytes: int
    received_at: float

    def count_end(self, trace: CallTrace | None, status: grpc.StatusCode | None = None) -> None:
        """Count the request as ended.

        Args:
            trace: of its call.
            status: with which it ended; None: that of the error.
        """
        status = status or code_of(self.error)
        self.metrics.failed(status.name, self.nbytes)
        if trace is not None:
            trace.failed(status, self.error, self.received_at)


class Requests:
    """Validates requests and queues them."""

    def __init__(self, engine: Engine, tracing: Tracing | None = None) -> None:
        """Start no thread yet; `tracing` makes spans, None: there are none."""
        self._engine = engine
        self._tracing = tracing
        # Large payloads are validated here, so that they do not delay small requests.
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="vqserve-payload")
        # When the last large one was in the server, in time.monotonic() seconds; None: its memory is given back.
        self._large_at: float | None = None

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def trace(self, call: Call) -> CallTrace | None:
        """Return what makes the spans of a call's requests; None: it is not traced."""
        return None if self._tracing is None else self._tracing.begin(call)

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
            recipient.rejected(Rejection(error, held, headers.unresolved, len(raw), received_at))
            return
        try:
            self._pool.submit(self._start, recipient, headers, raw, received_at, held)
        except RuntimeError:
            stopping = Draining("the server is stopping")
            recipient.rejected(Rejection(stopping, held, headers.unresolved, len(raw), received_at))

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
        metrics: FailedRequests = headers.unresolved
        try:
            token = recipient.caller.token
            # Also for each message of a stream: the token may have been revoked meanwhile.
            codebooks = None if token is None else token.check().codebooks
            try:
                header, data = headers.find(raw, codebooks)
            except VqserveError:
                metrics = headers.metrics_of(raw, codebooks)
                raise
            metrics = header.metrics
            if header.rows:
                self._engine.scheduler.check(recipient.caller, header.key, header.rows, recipient.deadline)
            nbytes = len(raw) + header.reply_bytes
            request = Request(self._engine, recipient.caller, header, nbytes, received_at, held=held)
            request.trace = recipient.trace
            held = 0
            if nbytes > _INLINE_BYTES:
                self._large_at = received_at
            try:
                if header.rows:
                    request.job, request.buffer = header.job(
                        data, caller=recipient.caller, on_done=recipient.ready, deadline=recipient.deadline
                    )
            except BaseException:
                # It is counted as rejected.
                request.is_counted = True
                request.release()
                raise
        except Exception as error:
            recipient.rejected(Rejection(error, held, metrics, len(raw), received_at))
            return
        if not recipient.accepted(request):
            request.release()
        elif request.job is None:
            recipient.ready()
        else:
            try:
                self._engine.quick.put(request.job)
            except Exception as error:
                request.job.resolve(error)


class Request:
    """A valid request, counted by the admission until `release`.

    Attributes:
        nbytes: size of the request and of the payload of its reply.
        rows: its tokens.
        message_bytes: size of the request.
        job: None if there is nothing to compute.
        buffer: the reply that the job writes.
        trace: makes its spans; None: it has none.
        is_counted: whether the metrics have counted its end.
    """

    is_counted = False
    trace: CallTrace | None = None
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
        self.rows = header.rows
        self.message_bytes = nbytes - header.reply_bytes
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
        header = self._header
        seconds = time.monotonic() - self._received_at
        timing: RequestTiming | None = None
        if self.job is None or self.buffer is None:
            queue_us, reply = 0, header.empty_reply
        else:
            outcome = self.job.outcome
            if outcome is None:
                raise RuntimeError("the request is not answered yet")
            if isinstance(outcome, BaseException):
                code = code_of(outcome)
                header.metrics.failed_once(self, code.name)
                if self.trace is not None:
                    self.trace.failed(code, outcome, self._received_at)
                raise outcome
            timing = outcome
            queue_us = timing.queue_us
            # In the order of the fields of ServedStats.
            reply = self.buffer.write_header(
                (queue_us, timing.compute_us, round(seconds * 1e6), timing.batch_requests, timing.batch_rows)
            )
        # Before it is sent: a caller with a reply finds its request in the metrics.
        header.metrics.answered(self, seconds, queue_us * 1e-6, len(reply))
        if self.trace is not None:
            self.trace.answered(timing, codebook=header.codebook, rows=self.rows, received_at=self._received_at)
        return reply

    def release(self) -> None:
        """Stop counting the request, after its reply is sent or its caller has left."""
        if self.job is not None and self.job.outcome is None:
            self._engine.scheduler.cancel(self.job)
        if not self.is_counted:
            self._header.metrics.failed_once(self, self._why_unanswered.name)
        self._engine.admission.leave(self._caller, self.rows, self.nbytes)

    @property
    def _why_unanswered(self) -> grpc.StatusCode:
        deadline = None if self.job is None else self.job.deadline
        # By its own clock the caller gives up a moment earlier.
        is_late = deadline is not None and deadline <= time.monotonic() + _EARLY_S
        return grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED


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
        self.trace = requests.trace(call)
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

    def rejected(self, rejection: Rejection) -> None:
        """End the call with the error."""
        self._requests.let_go(self.caller, rejection.held)
        rejection.count_end(self.trace)
        self._call.fail(rejection.error)

    def _closed(self) -> None:
        with _fields:
            self._is_closed = True
            request, self._request = self._request, None
        if request is not None:
            request.release()
        self._on_close()
