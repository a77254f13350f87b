"""Standard error that never makes its writers wait, whether somebody reads it or not.

A pipe that nobody reads is full after 64 KiB, and whoever then writes to it waits for ever: the event loop, and with it
SIGTERM; a thread of gRPC, and with it every call. So what Python writes (the log, warnings, tracebacks) goes through a
bounded queue to a thread of its own. Native code (gRPC, torch, a crash) writes to the file itself, which then refuses
what does not fit.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import select
import stat
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue

# Text that waits for a slow reader.
_MOST_BYTES = 1 << 20
# Seconds that the end of the process waits for a reader.
_DRAIN_S = 1.0


class BoundedStream(io.TextIOBase):
    """Text for a file: a thread writes it, and what does not fit into the queue is dropped and counted."""

    def __init__(self, fd: int, notice: Callable[[int], str], *, most_bytes: int = _MOST_BYTES) -> None:
        """Start the thread.

        Args:
            fd: file descriptor to write to, blocking or not.
            notice: returns the line that says how many lines were dropped; it is written in their place.
            most_bytes: bytes that may wait. A longer text is accepted when nothing else waits.
        """
        super().__init__()
        self._fd = fd
        self._notice = notice
        self._most_bytes = most_bytes
        # Both can be entered again: a signal handler that logs may have interrupted a write of its own thread.
        self._lock = threading.RLock()
        self._queue: SimpleQueue[bytes | threading.Event] = SimpleQueue()
        self._waiting = 0
        self._dropped = 0
        threading.Thread(target=self._run, name="stderr", daemon=True).start()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """UTF-8; what it cannot hold is escaped."""
        return "utf-8"

    def fileno(self) -> int:
        """Return the file descriptor."""
        return self._fd

    def writable(self) -> bool:
        """Return True."""
        return True

    def isatty(self) -> bool:
        """Return whether it is a terminal."""
        return os.isatty(self._fd)

    def write(self, text: str) -> int:
        """Queue text; returns at once."""
        data = text.encode("utf-8", "backslashreplace")
        with self._lock:
            if self._waiting and self._waiting + len(data) > self._most_bytes:
                self._dropped += max(1, text.count("\n"))
            else:
                self._put(self._dropped_notice() + data)
        return len(text)

    def drain(self, seconds: float = _DRAIN_S) -> bool:
        """Wait until all text so far was written; return whether it was in time."""
        done = threading.Event()
        self._queue.put(done)
        return done.wait(seconds)

    def _put(self, data: bytes) -> None:
        self._waiting += len(data)
        self._queue.put(data)

    def _dropped_notice(self) -> bytes:
        count, self._dropped = self._dropped, 0
        return self._notice(count).encode("utf-8", "backslashreplace") if count else b""

    def _run(self) -> None:
        while True:
            data = self._queue.get()
            if isinstance(data, threading.Event):
                data.set()
                continue
            _write(self._fd, data)
            with self._lock:
                self._waiting -= len(data)
                if self._dropped and not self._waiting:
                    # No later text will bring the notice.
                    self._put(self._dropped_notice())


def take_over(notice: Callable[[int], str]) -> BoundedStream:
    """Make standard error such a stream, for Python and for native code, until the process ends.

    Args:
        notice: returns the line that says how many lines were dropped.
    """
    fd = 2
    _refuse_when_full(fd)
    stream = BoundedStream(fd, notice)
    sys.stderr = stream

    def restore() -> None:
        stream.drain()
        # The thread ends with the interpreter, which may have more to say.
        sys.stderr = sys.__stderr__

    atexit.register(restore)
    return stream


def drain() -> None:
    """Wait, not for long, until standard error has been written; for those who end the process without its exit."""
    if isinstance(sys.stderr, BoundedStream):
        sys.stderr.drain()
    else:
        sys.stderr.flush()


def _refuse_when_full(fd: int) -> None:
    """Let writes to a pipe, a terminal or a socket fail where they would wait."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return
    try:
        # Opened again, because the flag would be one of all processes that share the open file.
        own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        # Sockets cannot be opened again, and the pipes of other users may not be.
        if stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode):
            os.set_blocking(fd, False)
        return
    os.dup2(own, fd)
    os.close(own)


def _write(fd: int, data: bytes) -> None:
    """Write all of `data`, waiting for the reader; nothing if there is none any more."""
    left = memoryview(data)
    # Also a full disk: there is nowhere to report it.
    with contextlib.suppress(OSError):
        while left:
            try:
                left = left[os.write(fd, left) :]
            except BlockingIOError:
                poll = select.poll()
                poll.register(fd, select.POLLOUT)
                poll.poll()
