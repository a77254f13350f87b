"""gRPC ignores options that it does not know without a word: each that the client sets must be seen to work."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading

import grpc
import pytest

from vqserve_client import Client, VqserveError
from vqserve_client.channel import channel_options
from vqserve_client.config import ClientConfig

OPTIONS = channel_options(ClientConfig(target="127.0.0.1:1", max_message_bytes=1 << 20))


class Listener:
    """Accepts connections, counts them, and closes them at once or passes them on."""

    def __init__(self, target=None):
        self._target = target
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self.accepted = threading.Semaphore(0)
        self.ended = threading.Semaphore(0)
        self.count = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.count += 1
            self.accepted.release()
            if self._target is None:
                connection.close()
            else:
                threading.Thread(target=self._pass_on, args=(connection,), daemon=True).start()

    def _pass_on(self, here):
        host, _, port = self._target.rpartition(":")
        with (
            here,
            socket.create_connection((host, int(port))) as there,
            selectors.DefaultSelector() as selector,
            # One side may leave while the other still sends.
            contextlib.suppress(ConnectionError),
        ):
            selector.register(here, selectors.EVENT_READ, there)
            selector.register(there, selectors.EVENT_READ, here)
            while True:
                for key, _ in selector.select():
                    data = key.fileobj.recv(1 << 16)
                    if not data:
                        self.ended.release()
                        return
                    key.data.sendall(data)

    def close(self):
        self._socket.close()


@pytest.fixture
def listener():
    made = []

    def make(target=None):
        made.append(Listener(target))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_every_client_has_a_connection_of_its_own(tiny, listener):
    between = listener(tiny.target)
    with Client(between.address) as first, Client(between.address) as second:
        assert first.codebooks() == second.codebooks()
        assert between.count == 2


def test_without_that_option_channels_share_a_connection(tiny, listener):
    """What the test above would not show if the option did nothing."""
    between = listener(tiny.target)
    options = [option for option in OPTIONS if option[0] != "grpc.use_local_subchannel_pool"]
    channels = [grpc.insecure_channel(between.address, options=options) for _ in range(2)]
    for channel in channels:
        grpc.channel_ready_future(channel).result(60)
    assert between.count == 1
    for channel in channels:
        channel.close()


def attempts_until(listener, options, *, attempts):
    """Return how many connections a channel tries while another channel with the same options tries `attempts`."""
    ours, theirs = listener(), listener()
    channels = [
        grpc.insecure_channel(one.address, options=given) for one, given in ((ours, OPTIONS), (theirs, options))
    ]
    # A call that waits for the server makes its channel go on trying.
    calls = [channel.unary_unary("/a/b").future(b"", wait_for_ready=True) for channel in channels]
    for _ in range(attempts):
        assert ours.accepted.acquire(timeout=60)
    for call in calls:
        call.cancel()
    for channel in channels:
        channel.close()
    return theirs.count


def test_a_lost_connection_is_tried_again_soon(listener):
    slow = [option for option in OPTIONS if "reconnect_backoff" not in option[0]]
    assert attempts_until(listener, slow, attempts=5) < 5


def test_messages_up_to_the_limit_and_no_further(tiny, latents):
    # In both directions: a request of 4 bytes for a float, a reply of 2 bytes for a token.
    array = latents(1 << 13, 4)
    with Client(tiny.target, max_message_bytes=1 << 20) as client:
        expected = client.encode(array)
    for option in ("grpc.max_send_message_length", "grpc.max_receive_message_length"):
        options = [(name, 4096 if name == option else value) for name, value in OPTIONS]
        with Client(tiny.target, max_message_bytes=1 << 20) as client:
            client._core.pool.pick(0)._opened()[0].close()
            client._core.pool.pick(0)._open = None
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("vqserve_client.channel.channel_options", lambda *_, options=options: options)
                with pytest.raises(VqserveError, match="larger than the client's limit of 4096 bytes"):
                    client.encode(array)
    assert expected.nbytes > 4096


def test_a_server_whose_machine_is_gone_is_noticed():
    # A tenth of each: a ping after about a second without a word, and a second for its answer.
    options = [
        (name, value // 10 if name in ("grpc.keepalive_time_ms", "grpc.http2.ping_timeout_ms") else value)
        for name, value in OPTIONS
    ]
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet():
            connection, _ = server.accept()
            # Empty SETTINGS and the acknowledgement of the caller's, and then nothing.
            connection.sendall(b"\0\0\0\4\0\0\0\0\0" + b"\0\0\0\4\1\0\0\0\0")
            greeted.append(connection)

        greeted = []
        thread = threading.Thread(target=greet)
        thread.start()
        with grpc.insecure_channel(f"127.0.0.1:{server.getsockname()[1]}", options=options) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary("/a/b")(b"", timeout=30)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "ping" in caught.value.details()
        thread.join()
        greeted[0].close()


def test_a_client_that_is_not_used_closes_its_connection(tiny, listener):
    options = [(name, 1000 if name == "grpc.client_idle_timeout_ms" else value) for name, value in OPTIONS]
    between = listener(tiny.target)
    with grpc.insecure_channel(between.address, options=options) as channel:
        channel.unary_unary("/vqserve.v1.TokenizerService/ListCodebooks")(b"", timeout=60)
        assert between.ended.acquire(timeout=60)
