"""A client of HTTP/2 without manners: it sends what it likes, as fast as the windows of the server allow.

It knows just enough of RFC 9113 to be served: it counts how its calls end and does not read their status.
"""

from __future__ import annotations

import socket
import struct
import time
from collections import Counter, deque
from dataclasses import dataclass

from reliability.beside import Control
from reliability.messages import ENCODE

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_ACK = _END_STREAM = 1
_END_HEADERS = 4
_INITIAL_WINDOW_SETTING = 4
_FRAME_BYTES = 16384
_WIDE = (1 << 31) - 1
_READ_BYTES = 1 << 20
# Frames that are put together for one write.
_WRITE_BYTES = 1 << 20
_IDLE_S = 0.001
_MOST_OUTSTANDING = 1 << 16
_GZIP = b"\x1f\x8b"


@dataclass
class _Call:
    """A call whose message is being sent."""

    stream: int
    window: int
    sent: int = 0
    has_begun: bool = False


class RawConnection:
    """One connection that makes calls of the same message, `outstanding` at once.

    Attributes:
        ended: how calls ended: "answered" (with any status) or "reset", and "goaway" where the server said that.
    """

    def __init__(self, target: str, message: bytes, *, compressed: bool = False, path: str = ENCODE) -> None:
        host, _, port = target.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=30)
        # The message as gRPC frames it.
        self._body = memoryview(struct.pack(">BI", compressed, len(message)) + message)
        self._head = _header_block(path, compressed=compressed)
        self._next_stream = 1
        self._window = 65535
        self._stream_window = 65535
        self._sending: deque[_Call] = deque()
        self._waiting: dict[int, _Call] = {}
        self._unread = b""
        # Frames that answer the server's.
        self._replies: list[bytes] = []
        self.is_closed = False
        self.ended: Counter[str] = Counter()
        wide = struct.pack(">HI", _INITIAL_WINDOW_SETTING, _WIDE)
        grow = struct.pack(">I", _WIDE - 65535)
        self._socket.sendall(_PREFACE + _frame(_SETTINGS, 0, 0, wide) + _frame(_WINDOW, 0, 0, grow))
        self._socket.setblocking(False)

    @property
    def open_calls(self) -> int:
        return len(self._waiting)

    def run(self, control: Control, *, calls: int | None, outstanding: int) -> None:
        """Make calls until `control` has ended, or `calls` were answered."""
        made = 0
        while not control.ended and not self.is_closed:
            while self.open_calls < outstanding and (calls is None or made < calls):
                self._begin()
                made += 1
            busy = self._write() | self._read()
            if calls is not None and made == calls and not self.open_calls:
                return
            if not busy:
                time.sleep(_IDLE_S)

    def close(self) -> None:
        self._socket.close()

    def _begin(self) -> None:
        call = _Call(self._next_stream, self._stream_window)
        self._next_stream += 2
        self._waiting[call.stream] = call
        self._sending.append(call)

    def _write(self) -> bool:
        """Send the frames that fit the windows, of one call after the other; return whether there were some."""
        frames, self._replies = self._replies, []
        size = 0
        for _ in range(len(self._sending)):
            if size >= _WRITE_BYTES:
                break
            call = self._sending.popleft()
            if call.stream not in self._waiting:
                continue
            if not call.has_begun:
                call.has_begun = True
                frames.append(_frame(_HEADERS, _END_HEADERS, call.stream, self._head))
            while (room := min(_FRAME_BYTES, self._window, call.window)) > 0 and call.sent < len(self._body):
                part = self._body[call.sent : call.sent + room]
                call.sent += len(part)
                call.window -= len(part)
                self._window -= len(part)
                size += len(part)
                flags = _END_STREAM if call.sent == len(self._body) else 0
                frames.append(_frame(_DATA, flags, call.stream, bytes(part)))
            if call.sent < len(self._body):
                self._sending.append(call)
            if self._window <= 0:
                break
        if frames:
            self._send(b"".join(frames))
        return bool(frames)

    def _send(self, data: bytes) -> None:
        """Send all; while the server does not take it, read what it says."""
        view = memoryview(data)
        while view and not self.is_closed:
            try:
                view = view[self._socket.send(view) :]
            except BlockingIOError:
                self._read()
                time.sleep(_IDLE_S)
            except OSError:
                self.is_closed = True
                self.ended["closed"] += 1

    def _read(self) -> bool:
        try:
            data = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self.is_closed = True
            self.ended["closed"] += 1
            return False
        self._unread += data
        position = 0
        while len(self._unread) - position >= 9:
            length = int.from_bytes(self._unread[position : position + 3], "big")
            if len(self._unread) - position < 9 + length:
                break
            kind, flags = self._unread[position + 3 : position + 5]
            stream = int.from_bytes(self._unread[position + 5 : position + 9], "big") & _WIDE
            self._take(kind, flags, stream, self._unread[position + 9 : position + 9 + length])
            position += 9 + length
        self._unread = self._unread[position:]
        return True

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _SETTINGS and not flags & _ACK:
            for setting, value in struct.iter_unpack(">HI", payload):
                if setting == _INITIAL_WINDOW_SETTING:
                    for call in self._waiting.values():
                        call.window += value - self._stream_window
                    self._stream_window = value
            self._replies.append(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self._replies.append(_frame(_PING, _ACK, 0, payload))
        elif kind == _WINDOW:
            grown = int.from_bytes(payload, "big") & _WIDE
            if not stream:
                self._window += grown
            elif stream in self._waiting:
                self._waiting[stream].window += grown
        elif kind == _GOAWAY:
            self.ended["goaway"] += 1
        elif self._waiting.get(stream) and (kind == _RESET or (kind in {_DATA, _HEADERS} and flags & _END_STREAM)):
            del self._waiting[stream]
            self.ended["reset" if kind == _RESET else "answered"] += 1


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def _header_block(path: str, *, compressed: bool) -> bytes:
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    if compressed:
        fields["grpc-encoding"] = "gzip"
    # Literal fields, neither indexed nor compressed (RFC 7541, 6.2.2).
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in fields.items())


def _text(value: str) -> bytes:
    return bytes((len(value),)) + value.encode()


def send(
    control: Control,
    target: str,
    message: bytes,
    calls: int | None = None,
    outstanding: int = _MOST_OUTSTANDING,
) -> Counter[str]:
    """Make calls over one connection, to run beside what is measured; count how they ended.

    A message that begins as gzip does is sent as a compressed one.
    """
    connection = RawConnection(target, message, compressed=message.startswith(_GZIP))
    control.begin()
    try:
        connection.run(control, calls=calls, outstanding=outstanding)
    finally:
        connection.close()
    connection.ended["open at the end"] = connection.open_calls
    return connection.ended
