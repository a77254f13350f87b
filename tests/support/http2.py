"""A bare socket that speaks just enough HTTP/2 to do to a server what no gRPC library would."""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import time
from collections.abc import Iterator, Mapping

from support.waiting import DEADLINE_S

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
ACK, END_STREAM, END_HEADERS = 1, 1, 4
INITIAL_WINDOW_SIZE = 4
MAX_FRAME = 1 << 14
_FULL_S = 2.0


class Peer:
    """One HTTP/2 connection, frame by frame.

    `window`: bytes of a reply that the server may send of itself; `buffer`: of the socket, for what is not read.
    """

    def __init__(self, target: str, *, window: int = 65535, buffer: int | None = None) -> None:
        host, _, port = target.rpartition(":")
        self._socket = socket.socket()
        if buffer is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        # A server that does not read.
        self._socket.settimeout(_FULL_S)
        self._socket.connect((host, int(port)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._unread = b""
        self.farewell: bytes | None = None  # the server's reason for closing
        self._socket.sendall(PREFACE)
        self.send(SETTINGS, struct.pack(">HI", INITIAL_WINDOW_SIZE, window))
        self.send(SETTINGS, flags=ACK)

    def send(self, kind: int, body: bytes = b"", *, flags: int = 0, stream: int = 0) -> None:
        """Send a frame."""
        self._socket.sendall(struct.pack(">I", len(body))[1:] + struct.pack(">BBI", kind, flags, stream) + body)

    def frames(self, seconds: float = DEADLINE_S) -> Iterator[tuple[int, int, bytes]]:
        """Yield the kind, flags and body of the frames that come within `seconds`.

        Raises:
            EOFError: the server has closed the connection.
        """
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            length = int.from_bytes(self._unread[:3], "big")
            if len(self._unread) >= 9 + length:
                frame, self._unread = self._unread[: 9 + length], self._unread[9 + length :]
                if frame[3] == GOAWAY:
                    self.farewell = frame[17:]
                yield frame[3], frame[4], frame[9:]
                continue
            self._socket.settimeout(left)
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                return
            if not data:
                raise EOFError
            self._unread += data

    def call(self, method: str, request: bytes, *, end: bool = False, stream: int = 1, said: int | None = None) -> None:
        """Begin a call and send a request; its length prefix can claim more bytes (`said`)."""
        self.begin(f"/vqserve.v1.TokenizerService/{method}", stream=stream)
        message = b"\0" + struct.pack(">I", len(request) if said is None else said) + request
        for start in range(0, len(message), MAX_FRAME):
            is_last = end and start + MAX_FRAME >= len(message)
            self.send(DATA, message[start : start + MAX_FRAME], flags=END_STREAM * is_last, stream=stream)

    def begin(self, path: str, *, stream: int = 1, metadata: Mapping[str, bytes] | None = None) -> None:
        """Begin a call, and send nothing yet."""
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path,
            ":authority": "test",
            "content-type": "application/grpc",
            "te": "trailers",
        }
        # Literals that are no part of any table (RFC 7541, 6.2.2), their lengths below 127.
        encoded = {name: value.encode() for name, value in fields.items()} | dict(metadata or {})
        block = b"".join(
            b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value for name, value in encoded.items()
        )
        self.send(HEADERS, block, flags=END_HEADERS, stream=stream)

    def fill(self) -> None:
        """Begin calls, and read no answer, until the buffers are full: no call ends by itself then."""
        with contextlib.suppress(TimeoutError):
            for number in itertools.count():
                self.begin("/no.Such/Method", stream=2 * number + 1)

    def take(self, nbytes: int) -> bytes:
        """Let the server send `nbytes` of the reply, and return them."""
        for stream in (0, 1):
            self.send(WINDOW_UPDATE, struct.pack(">I", nbytes), stream=stream)
        got = b""
        with contextlib.suppress(EOFError):
            for kind, _, body in self.frames():
                got += body if kind == DATA else b""
                if len(got) >= nbytes:
                    break
        return got

    def close(self) -> None:
        self._socket.close()
