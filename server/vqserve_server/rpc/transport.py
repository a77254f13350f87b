"""gRPC's completion queue, and the thread that handles its events: new calls, messages, replies that were sent.

Both of grpcio's servers are built on this queue, and what they add costs more than gRPC itself: a thread for each
waiting call, or an event loop that a second thread wakes for each event (decision 0002). Here the thread that computes
a reply sends it, and wakes no other thread; and small computations are chores of the thread that receives requests.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from vqserve.errors import Overloaded
from vqserve_server.event_log import event
from vqserve_server.rpc.call import Call
from vqserve_server.rpc.callers import Callers, stranger
from vqserve_server.rpc.connections import Connections
from vqserve_server.rpc.gate import Gate
from vqserve_server.rpc.reserved import Places
from vqserve_server.rpc.status import Status

# The retry delay for a call above the limit; the server cannot know when another call will end.
_RETRY_AFTER_S = 1.0

logger = logging.getLogger(__name__)

# Starts to answer a call, and returns at once.
Handler = Callable[[Call], None]
# Interval of the check for idle calls.
_IDLE_CHECK_S = 1.0
# A deadline that has passed: only what is there already is waited for.
_AT_ONCE = 0.0
# Events that are handled before chores that are due, however many have arrived: those of some 40 calls.
_MOST_BEFORE_CHORES = 160
# Before the server closes, it lets no call end until no call has arrived for so long, and for at most so long.
_QUIET_S = 0.1
_MOST_HOLD_S = 0.5
# How long calls may take to end after they were cancelled. They take milliseconds.
_MOST_CANCEL_S = 2.0
# Calls that were refused and have not ended, because their callers do not read. Above that, the caller that has most of
# them loses its oldest; only while those do not end either, no more calls are taken.
_MOST_REFUSED = 256


class Chores(Protocol):
    """Work that calls leave behind for the transport's thread, when it has handled what had arrived.

    Attributes:
        is_due: whether there is any.
    """

    is_due: bool

    def begin(self) -> None:
        """Learn that the calling thread is the transport's."""

    def compute(self) -> None:
        """Do some of it."""


class Transport:
    """Listens, and hands each call to the handler of its method, on threads of its own."""

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        *,
        options: Sequence[tuple[str, int]],
        max_calls: int,
        max_calls_per_caller: int | None = None,
        idle_s: float = 0.0,
        reserved: Mapping[str, int] | None = None,
        callers: Callers | None = None,
        name: str = "vqserve-grpc",
        on_refused: Callable[[str, Exception, str], None] = lambda method, error, reason: None,
        now_and_then: Callable[[], None] = lambda: None,
        chores: Chores | None = None,
    ) -> None:
        """Make the transport; `listen` to some addresses before `start`.

        Args:
            handlers: by the method's full name, "/package.Service/Method".
            options: options of gRPC, as pairs of name and value.
            max_calls: open calls at once; more fail with RESOURCE_EXHAUSTED.
            max_calls_per_caller: those of one caller; None: as many as of all.
            idle_s: how long a call may wait for its caller before it ends with UNAVAILABLE; 0: for ever.
            callers: decides who may call; None: everyone.
            name: of the threads.
            on_refused: called with the method of a call that no handler gets, why, and for load with what there was too
                much of, else "".
            reserved: methods whose calls do not count among the others, and how many of each may be open; above that
                the caller that has most of them loses its oldest.
            now_and_then: called once per second.
            chores: done by the thread of the methods that are not reserved; None: there are none.
        """
        self._handlers = handlers
        self._max_calls = max_calls
        self._max_calls_per_caller = max_calls if max_calls_per_caller is None else max_calls_per_caller
        self._idle_s = idle_s
        self._on_refused = on_refused
        self._now_and_then = now_and_then
        self._chores = chores
        self._refused = Places(_MOST_REFUSED)
        self._places = {method: Places(most) for method, most in (reserved or {}).items()}
        # For the thread of the reserved methods.
        self._reserved_refused = Places(_MOST_REFUSED)
        # The calls that have not ended; those of them that were not refused; and those that count apart.
        self._calls: set[Call] = set()
        self._accepted: set[Call] = set()
        self._reserved_calls: set[Call] = set()
        self._callers = callers or Callers()
        self._gate = Gate()
        self._last_call_at = -1.0  # time.monotonic() seconds
        # A message of 64 MiB keeps its thread for a tenth of a second: what is reserved has a queue and a thread too.
        self._queue, self._reserved_queue = cygrpc.CompletionQueue(), cygrpc.CompletionQueue()
        self._server = cygrpc.Server(list(options), False)
        self._connections = Connections()
        for queue in (self._queue, self._reserved_queue):
            self._server.register_completion_queue(queue)
        for method in self._places:
            self._server.register_method(method)
        self._turns = {name: 0, f"{name}-reserved": 0}
        self._threads = [
            threading.Thread(target=self._serve, args=arguments, name=arguments[0], daemon=True)
            for arguments in zip(
                self._turns, (self._queue, self._reserved_queue), (self._calls, self._reserved_calls), strict=True
            )
        ]
        self._lock = threading.Lock()
        self._is_asking = False  # for the next call, one of reserved methods apart
        self._is_closed = self._is_stopping = False
        self._stopped = threading.Event()

    def listen(self, address: str, credentials: Any = None) -> int:
        """Listen on HOST:PORT or unix:PATH, and return the port.

        Args:
            address: where.
            credentials: grpc.ServerCredentials, for TLS; None: plaintext.

        Raises:
            RuntimeError: the address cannot be bound.
        """
        own = None if credentials is None else credentials._credentials
        port: int = self._server.add_http2_port(address.encode(), own)
        if not port:
            raise RuntimeError(f"cannot bind {address}")
        return port

    @property
    def open_calls(self) -> int:
        """How many calls are open, but for refused ones and those of reserved methods."""
        return len(self._accepted)

    def turns(self) -> dict[str, Callable[[], int]]:
        """Return, by the names of the threads, how often each has looked for an event: once a second at least."""
        return {name: partial(self._turns.__getitem__, name) for name in self._turns}

    @property
    def connections(self) -> int | None:
        """Open connections; None: gRPC does not tell."""
        return self._connections.count()

    def start(self) -> None:
        """Accept calls."""
        self._server.start()
        self._ask()
        for method in self._places:
            self._ask_reserved(method)
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Accept no more connections and calls, and tell all callers so (GOAWAY); open calls go on.

        gRPC drops calls that are on their way meanwhile: callers that wait for an answer make none, so all wait for a
        moment. Closing twice is fine, and closing what was not started.
        """
        if not self._threads[0].is_alive():
            return
        self._gate.shut()
        until = time.monotonic() + _MOST_HOLD_S
        while (left := min(self._last_call_at + _QUIET_S, until) - time.monotonic()) > 0:
            time.sleep(left)
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._server.shutdown(self._queue, self._on_stopped)
        self._gate.open()

    def stop(self, linger_s: float) -> bool:
        """Close, cancel the calls that are open after `linger_s` seconds, and return whether the threads have ended.

        gRPC keeps a connection for some 20 seconds whose caller reads nothing, and its threads with it. They end with
        the process at the latest.

        Stopping twice is fine, and stopping what was not started.
        """
        self.close()
        with self._lock:
            if self._is_stopping or not self._is_closed:
                return True
            self._is_stopping = True
        if not self._stopped.wait(linger_s):
            self._server.cancel_all_calls()
        until = time.monotonic() + _MOST_CANCEL_S
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0))
            if thread.is_alive():
                return False
        self._server.destroy()
        return True

    def _serve(self, name: str, queue: Any, calls: set[Call]) -> None:
        """Handle the events of a queue, whose calls are in that set, until it is shut down."""
        next_check = time.monotonic() + _IDLE_CHECK_S
        chores = self._chores if queue is self._queue else None
        if chores is not None:
            chores.begin()
        waited = 0  # events that were handled while chores were due
        while True:
            is_due = chores is not None and chores.is_due
            # What has arrived is handled first, so that it is computed together.
            completed = queue.poll(_AT_ONCE if is_due else time.time() + _IDLE_CHECK_S)
            self._turns[name] += 1
            if completed.completion_type == cygrpc.CompletionType.queue_shutdown:
                return
            try:
                is_event = completed.completion_type != cygrpc.CompletionType.queue_timeout
                if is_event and completed.tag is not None:
                    completed.tag(completed)
                waited = waited + 1 if is_due else 0
                if chores is not None and is_due and (not is_event or waited >= _MOST_BEFORE_CHORES):
                    waited = 0
                    chores.compute()
                if time.monotonic() >= next_check:
                    next_check = time.monotonic() + _IDLE_CHECK_S
                    self._end_idle(calls)
                    if queue is self._queue:
                        self._now_and_then()
            except Exception:
                logger.exception(event("grpc_event_failed"))
            # The event refers to its call, and so keeps a connection open.
            del completed
            if self._stopped.is_set():
                self._shut_down(queue, calls)

    def _shut_down(self, queue: Any, calls: set[Call]) -> None:
        """End the thread of a queue. Not before `_closed` of every call: after that no operation starts for a call."""
        if not calls:
            queue.shutdown()

    def _ask(self) -> None:
        """Ask for the next call, unless there are too many: then it waits in gRPC, and its connection with it."""
        if self._is_asking or len(self._calls) >= self._max_calls + 2 * _MOST_REFUSED:
            return
        with self._lock:
            if not self._is_closed:
                self._is_asking = True
                self._server.request_call(self._queue, self._queue, self._on_call)

    def _ask_reserved(self, method: str) -> None:
        with self._lock:
            if not self._is_closed:
                tag = partial(self._on_reserved_call, method)
                queue = self._reserved_queue
                self._server.request_registered_call(queue, queue, method, tag)

    def _on_call(self, event: Any) -> None:
        self._is_asking = False
        self._ask()
        if not event.success:
            return
        peer = event.call.peer().decode()
        refusal: Exception | None = None
        method = event.call_details.method.decode("ascii", "backslashreplace")
        try:
            caller = self._callers.enter(peer, event.invocation_metadata)
        except Exception as error:
            caller, refusal = stranger(peer), error
        call = Call(event, caller, method, self._on_end, self._gate)
        self._last_call_at = time.monotonic()
        self._calls.add(call)
        handler = self._handlers.get(method)
        if refusal is not None:
            self._refuse(call, refusal)
        elif handler is None:
            call.end(Status(grpc.StatusCode.UNIMPLEMENTED, f"there is no method {call.method[:200]}"))
        elif len(self._accepted) >= self._max_calls:
            self._refuse(call, Overloaded("too many calls at once", retry_after_s=_RETRY_AFTER_S), "calls")
        elif caller.accepted >= self._max_calls_per_caller:
            text = f"too many calls of the caller {caller.name} at once"
            self._refuse(call, Overloaded(text, retry_after_s=_RETRY_AFTER_S), "caller_calls")
        else:
            caller.accepted += 1
            self._accepted.add(call)
            _handle(handler, call)
            return
        # Its caller may never read why. Such calls must not keep those of others waiting.
        too_many = self._refused.enter(call)
        if too_many is not None:
            too_many.abort(Status(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many refused calls are not read"))

    def _refuse(self, call: Call, error: Exception, reason: str = "") -> None:
        self._on_refused(call.method, error, reason)
        call.fail(error)

    def _on_end(self, call: Call) -> None:
        self._calls.discard(call)
        if call in self._accepted:
            self._accepted.discard(call)
            call.caller.accepted -= 1
        else:
            self._refused.leave(call)
        self._callers.leave(call.caller)
        if not self._is_asking:
            self._ask()

    def _on_reserved_call(self, method: str, event: Any) -> None:
        self._ask_reserved(method)
        if not event.success:
            return
        call = Call(event, stranger(event.call.peer().decode()), method, self._on_reserved_end)
        self._reserved_calls.add(call)
        # First: whoever is refused must not take the place of one who is not.
        is_handled = _handle(self._handlers[method], call)
        too_many = (self._places[method] if is_handled else self._reserved_refused).enter(call)
        if too_many is not None:
            too_many.abort(Status(grpc.StatusCode.RESOURCE_EXHAUSTED, "there are too many calls of this method"))

    def _on_reserved_end(self, call: Call) -> None:
        self._reserved_calls.discard(call)
        self._places[call.method].leave(call)
        self._reserved_refused.leave(call)

    def _end_idle(self, calls: set[Call]) -> None:
        if not self._idle_s:
            return
        before = time.monotonic() - self._idle_s
        status = Status(grpc.StatusCode.UNAVAILABLE, f"the call was idle for {self._idle_s:g} s: make another one")
        for call in [call for call in calls if call.is_idle(before)]:
            logger.info(event("call_idle", method=call.method, seconds=self._idle_s))
            call.abort(status)

    def _on_stopped(self, _event: Any) -> None:
        self._stopped.set()
        # That thread may wait for an event.
        self._shut_down(self._reserved_queue, self._reserved_calls)


def _handle(handler: Handler, call: Call) -> bool:
    """Return whether the handler has taken the call."""
    try:
        handler(call)
    except Exception as error:
        call.fail(error)
        return False
    return True
