"""The gRPC channel of one client: opened when it is first needed, once per process, and safe across a fork.

gRPC's core cannot be copied in the middle of a call: the child hangs or crashes. So a fork holds back new requests and
waits for those that are in flight, which normally takes milliseconds. Nothing is lost, and no caller needs to know.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import grpc

from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_client.config import ClientConfig
from vqserve_client.errors import Closed

# A server that hangs must not keep the process from forking for ever; then the child is on its own.
LONGEST_WAIT_S = 10.0


class ForkGate:
    """Counts the requests of this process that are under way, and is shut while it forks."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._under_way = 0
        self._retire: set[Callable[[], None]] = set()
        self._shut = False

    def enter(self, retire: Callable[[], None] | None = None) -> None:
        """Begin a request, after a fork that is going on.

        Args:
            retire: for a call that has no end of its own: asks it to end soon.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._shut)
            self._under_way += 1
            if retire is not None:
                self._retire.add(retire)

    def leave(self, retire: Callable[[], None] | None = None) -> None:
        """End a request that has entered with the same argument."""
        with self._changed:
            self._under_way -= 1
            if retire is not None:
                self._retire.discard(retire)
            self._changed.notify_all()

    def before_fork(self) -> None:
        """Shut the gate and wait until nothing is under way."""
        with self._changed:
            # One fork at a time.
            self._changed.wait_for(lambda: not self._shut)
            self._shut = True
            for retire in self._retire:
                retire()
            self._changed.wait_for(lambda: self._under_way == 0, LONGEST_WAIT_S)

    def after_fork_in_parent(self) -> None:
        """Open the gate."""
        with self._changed:
            self._shut = False
            self._changed.notify_all()

    def after_fork_in_child(self) -> None:
        """Begin anew: the threads that were inside do not exist here."""
        self._reset()


gate = ForkGate()
os.register_at_fork(
    before=gate.before_fork,
    after_in_parent=gate.after_fork_in_parent,
    after_in_child=gate.after_fork_in_child,
)


def channel_options(max_message_bytes: int) -> list[tuple[str, int]]:
    """Return gRPC's channel options."""
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        # A connection of its own for every channel: a forked child must not find its parent's socket in a shared pool.
        ("grpc.use_local_subchannel_pool", 1),
        # During calls, as often as a gRPC server allows unless it was told otherwise; more often, and it hangs up.
        ("grpc.keepalive_time_ms", 300_000),
        # What is called keepalive_timeout_ms changes nothing: gRPC waits for the answer as for any other ping's.
        ("grpc.http2.ping_timeout_ms", 20_000),
        # gRPC's default of a second would make every retry of this client fail on the same lost connection.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 5_000),
    ]


# The methods by name, as gRPC calls them. Messages are bytes here: calls.py reads and writes them.
_SERVICE = pb.DESCRIPTOR.services_by_name["TokenizerService"]
_METHODS = tuple(method.name for method in _SERVICE.methods if not method.client_streaming)
# Those that have a streaming form, and what it adds to their names.
_STREAM = "Stream"
STREAMED = frozenset(method.name.removesuffix(_STREAM) for method in _SERVICE.methods if method.client_streaming)


class Connection:
    """The channel of one client in whatever process it is used.

    Attributes:
        closed: whether `close` was called.
        has_streams: False once the server has said that it has no streaming methods.
    """

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._open: _Open | None = None
        self.closed = False
        self.has_streams = True
        _connections.add(self)

    @property
    def target(self) -> str:
        """Return the server's address."""
        return self._config.target

    def method(self, name: str) -> Any:
        """Return a method of the service in this process, from bytes to bytes.

        Raises:
            Closed: after `close`.
        """
        return self._opened()[1][name]

    def stream(self, name: str) -> Any:
        """Return the streaming form of a method, from an iterator of bytes to one.

        Raises:
            Closed: after `close`.
        """
        return self._opened()[0].stream_stream(f"/{_SERVICE.full_name}/{name}{_STREAM}")

    def channel(self) -> grpc.Channel:
        """Return the channel of this process.

        Raises:
            Closed: after `close`.
        """
        return self._opened()[0]

    def close(self) -> None:
        """Close the channel, if this process opened one; calls under way fail."""
        with self._lock:
            self.closed = True
            opened, self._open = self._open, None
        if opened is not None:
            opened[0].close()

    def _opened(self) -> _Open:
        opened = self._open
        if opened is None:
            with self._lock:
                if self.closed:
                    raise Closed("this client is closed", target=self.target)
                opened = self._open
                if opened is None:
                    channel = grpc.insecure_channel(
                        self.target, options=channel_options(self._config.max_message_bytes)
                    )
                    methods: dict[str, Any] = {
                        name: channel.unary_unary(f"/{_SERVICE.full_name}/{name}") for name in _METHODS
                    }
                    opened = self._open = (channel, methods)
        return opened

    def after_fork_in_child(self) -> None:
        """Forget the parent's channel, and a lock that one of its threads may have held."""
        self._lock = threading.Lock()
        if self._open is not None:
            # Kept, not dropped: its destructor would speak to threads and sockets that are the parent's.
            _inherited.append(self._open)
            self._open = None


_Open = tuple[grpc.Channel, dict[str, Any]]
_inherited: list[_Open] = []
_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for connection in list(_connections):
        connection.after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
