"""The gRPC channel of one client: opened when it is first needed, once per process, and safe across a fork.

gRPC's core cannot be copied in the middle of a call: the child hangs or crashes. So a fork holds back new requests and
waits for those that are in flight, which normally takes milliseconds. Nothing is lost, and callers do not notice it.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import grpc

from vqserve.errors import Closed, InvalidOption
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_client.config import ClientConfig
from vqserve_client.identity import Identity
from vqserve_client.target import Address
from vqserve_client.tls import Tls

# A server that hangs must not block a fork forever; after this time the child may crash.
LONGEST_WAIT_S = 10.0


class ForkGate:
    """Counts the requests of this process that are in flight; closed while the process forks."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._in_flight = 0
        self._enders: set[Callable[[], None]] = set()
        self._closed = False

    def enter(self, end_sending: Callable[[], None] | None = None) -> None:
        """Begin a request; wait while the process forks.

        Args:
            end_sending: for a stream, which may stay open: asks it to end soon.
        """
        with self._lock:
            if self._closed:
                self._changed.wait_for(lambda: not self._closed)
            self._in_flight += 1
            if end_sending is not None:
                self._enders.add(end_sending)

    def leave(self, end_sending: Callable[[], None] | None = None) -> None:
        """End a request that entered with the same argument."""
        with self._lock:
            self._in_flight -= 1
            if end_sending is not None:
                self._enders.discard(end_sending)
            if self._closed:
                self._changed.notify_all()

    def before_fork(self) -> None:
        """Close the gate and wait until no request is in flight."""
        with self._changed:
            # One fork at a time.
            self._changed.wait_for(lambda: not self._closed)
            self._closed = True
            for end_sending in self._enders:
                end_sending()
            self._changed.wait_for(lambda: self._in_flight == 0, LONGEST_WAIT_S)

    def after_fork_in_parent(self) -> None:
        """Open the gate."""
        with self._changed:
            self._closed = False
            self._changed.notify_all()

    def after_fork_in_child(self) -> None:
        """Reset: the threads of the requests do not exist in the child."""
        self._reset()


gate = ForkGate()
os.register_at_fork(
    before=gate.before_fork,
    after_in_parent=gate.after_fork_in_parent,
    after_in_child=gate.after_fork_in_child,
)


def channel_options(config: ClientConfig, address: Address | None = None) -> list[tuple[str, str | int]]:
    """Return gRPC's channel options.

    Args:
        config: the client's options.
        address: what the channel connects to; None: the first address of the client.
    """
    address = address or config.address.addresses[0]
    is_one_of_several = address.of_name is not None or len(config.address.addresses) > 1
    return [
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.max_receive_message_length", config.max_message_bytes),
        # A separate connection for every channel: a forked child must not use its parent's socket from a shared pool.
        ("grpc.use_local_subchannel_pool", 1),
        # During calls: those to a server that hangs move to another one well within the default timeout. vqserve allows
        # a ping every ten seconds; to other servers gRPC sends only two without data, and fewer if they object.
        ("grpc.keepalive_time_ms", 12_000),
        # keepalive_timeout_ms has no effect: gRPC waits for the answer to any ping for this time.
        ("grpc.http2.ping_timeout_ms", 10_000),
        # gRPC's default of a second would make every retry of this client fail on the same lost connection.
        ("grpc.initial_reconnect_backoff_ms", 100),
        # Of several servers one that comes back is to have its share soon.
        ("grpc.max_reconnect_backoff_ms", 2_000 if is_one_of_several else 5_000),
        # A client that is not used gives back its connections.
        ("grpc.client_idle_timeout_ms", 300_000),
        # A name is resolved again when a connection ends; gRPC's default of 30 s is long for a restart.
        ("grpc.dns_min_time_between_resolutions_ms", 2_000),
        *([] if config.address.is_proxied and address.of_name is None else [("grpc.enable_http_proxy", 0)]),
        *_name_options(config.tls, address),
    ]


def _name_options(tls: Tls | None, address: Address) -> list[tuple[str, str | int]]:
    """Return the options for the name that the server has, where gRPC does not connect to that name."""
    if tls is not None and tls.server_name is not None:
        return [("grpc.ssl_target_name_override", tls.server_name)]
    if address.of_name is None:
        return []
    options: list[tuple[str, str | int]] = [("grpc.default_authority", f"{address.of_name}:{address.port}")]
    return options if tls is None else [*options, ("grpc.ssl_target_name_override", address.of_name)]


def open_channel(config: ClientConfig, api: Any = grpc, address: Address | None = None) -> Any:
    """Return a new channel, of `grpc` or of `grpc.aio`, to an address; None: the first one of the client.

    Raises:
        InvalidOption: a file of its TLS cannot be used any longer.
    """
    address = address or config.address.addresses[0]
    options = channel_options(config, address)
    if config.tls is None:
        return api.insecure_channel(address.uri, options=options)
    return api.secure_channel(address.uri, config.tls.credentials(), options=options)


# The methods by name, as gRPC calls them. Messages are bytes here: calls.py reads and writes them.
_SERVICE = pb.DESCRIPTOR.services_by_name["TokenizerService"]
_METHODS = tuple(method.name for method in _SERVICE.methods if not method.client_streaming)
# The methods that have a streaming form, and the suffix of its name.
_STREAM = "Stream"
STREAMED = frozenset(method.name.removesuffix(_STREAM) for method in _SERVICE.methods if method.client_streaming)


class Connection:
    """A channel of one client to one address, in each process that uses it.

    Attributes:
        address: what it connects to.
        closed: whether `close` was called.
        is_proven, failures: see Member (pool.py); the only connection of a client needs neither.
        has_streams: False once the server has said that it has no streaming methods.
        metadata: returns the metadata of a request, from its id.
    """

    is_proven = True
    failures = 0

    def __init__(self, config: ClientConfig, address: Address | None = None, identity: Identity | None = None) -> None:
        """Open nothing yet.

        Args:
            config: the client's options.
            address: what to connect to; None: the first address of the client.
            identity: what the server knows the client by; None: what the options say.
        """
        self._config = config
        self.address = address or config.address.addresses[0]
        self._lock = threading.Lock()
        self._open: _Open | None = None
        self._tls_version: object = None
        self.closed = False
        self.has_streams = True
        self.metadata = (identity or identity_of(config)).metadata
        _connections.add(self)

    @property
    def target(self) -> str:
        """Return the server's address."""
        return self._config.target if len(self._config.address.addresses) == 1 else self.address.uri

    def answered(self, request_bytes: int) -> None:
        """Take note that a request of this size is no longer under way; only one of several connections counts them."""

    @property
    def is_encrypted(self) -> bool:
        """Return whether it uses TLS."""
        return self._config.tls is not None

    def method(self, name: str) -> Any:
        """Return a method of the service in this process, from bytes to bytes.

        Raises:
            Closed: after `close`.
        """
        return (self._open or self._opened())[1][name]

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

    def renew(self) -> None:
        """Open a new channel if files of TLS were replaced since this one was opened; its calls fail as retryable.

        While they cannot be used, for example because only one of two is new, the channel stays.
        """
        tls = self._config.tls
        if tls is None:
            return
        with self._lock:
            if self._open is None or tls.version() == self._tls_version:
                return
            try:
                channel, self._open = self._open[0], self._open_channel()
            except InvalidOption:
                self._tls_version = None
                return
        channel.close()

    def close(self) -> None:
        """Close the channel, if this process opened one; calls that run fail."""
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
                    opened = self._open = self._open_channel()
        return opened

    def _open_channel(self) -> _Open:
        tls = self._config.tls
        # First: what is replaced after this is noticed.
        self._tls_version = None if tls is None else tls.version()
        channel: grpc.Channel = open_channel(self._config, address=self.address)
        return channel, {name: channel.unary_unary(f"/{_SERVICE.full_name}/{name}") for name in _METHODS}

    def after_fork_in_child(self) -> None:
        """Drop the parent's channel, and locks that one of its threads may have held."""
        self._lock = threading.Lock()
        if self._open is not None:
            # Kept, not dropped: its destructor would use threads and sockets of the parent.
            _inherited.append(self._open)
            self._open = None


def identity_of(config: ClientConfig) -> Identity:
    """Return what a server knows a client by."""
    return Identity(token=config.token, token_file=config.token_file, metadata=config.metadata)


_Open = tuple[grpc.Channel, dict[str, Any]]
_inherited: list[_Open] = []
_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for connection in list(_connections):
        connection.after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
