"""The connection between a worker and its parent, on which each asks the other to do something.

One JSON object a line: a question has `id`, `command` and `argument`, its answer `id` and `answer`, or `error`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Self

from vqserve_server.event_log import event

# Environment variable with the file descriptor of the worker's end; it is not a setting for users.
CONTROL_VARIABLE = "_VQSERVE_CONTROL"
# What an operator can ask for.
STATUS, RELOAD, LOG_LEVEL, DRAIN = "status", "reload", "log_level", "drain"
# Bytes: a list of tens of thousands of codebooks.
_LONGEST_LINE = 16 << 20

# Does what a command says; a worker returns what it did, a parent what each of its workers did.
Handle = Callable[[str, str], Awaitable[Any]]

logger = logging.getLogger(__name__)


class ControlError(Exception):
    """There is no answer: the text says why."""


class Control:
    """One end of the connection. Call its methods from one event loop."""

    def __init__(self, end: socket.socket, handle: Handle) -> None:
        """Take an end; nothing is read before `run`.

        Args:
            end: a socket.
            handle: answers the other side's commands.
        """
        self._end = end
        self._handle = handle
        self._writer: asyncio.StreamWriter | None = None
        # Set for good when the connection is open, or cannot be.
        self._was_opened = asyncio.Event()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._count = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    def of(cls, environ: Mapping[str, str], handle: Handle) -> Self | None:
        """Return the end that the parent has opened for this process; None if no parent has."""
        descriptor = environ.get(CONTROL_VARIABLE)
        if descriptor is None:
            return None
        os.set_inheritable(int(descriptor), False)
        return cls(socket.socket(fileno=int(descriptor)), handle)

    async def run(self) -> None:
        """Answer the other side until it closes its end, and then fail what is still asked."""
        try:
            reader, self._writer = await asyncio.open_unix_connection(sock=self._end, limit=_LONGEST_LINE)
        finally:
            self._was_opened.set()
        try:
            async for line in reader:
                self._take(json.loads(line))
        except ConnectionError:
            # The other side was killed with something unread; whoever started it reports its end.
            logger.debug(event("control_cut_off"))
        except (OSError, ValueError):
            logger.exception(event("control_failed"))
        finally:
            self._writer.close()
            self._writer = None
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(ControlError("the process has ended"))

    async def ask(self, command: str, argument: str = "") -> Any:
        """Return the other side's answer to a command; before `run` has opened the connection, it waits.

        Raises:
            ControlError: it failed, or the other side has ended.
        """
        await self._was_opened.wait()
        self._count += 1
        number = self._count
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._send({"id": number, "command": command, "argument": argument})
            return await future
        finally:
            del self._waiting[number]

    def _take(self, message: Mapping[str, Any]) -> None:
        if "command" in message:
            task = asyncio.get_running_loop().create_task(self._answer(message))
            # The loop itself keeps only a weak reference.
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return
        future = self._waiting.get(message["id"])
        if future is None or future.done():
            return
        if "error" in message:
            future.set_exception(ControlError(message["error"]))
        else:
            future.set_result(message["answer"])

    async def _answer(self, message: Mapping[str, Any]) -> None:
        number, command = message["id"], message["command"]
        try:
            reply = {"id": number, "answer": await self._handle(command, message["argument"])}
        except Exception:
            logger.exception(event("command_failed", command=command))
            reply = {"id": number, "error": "it failed; the log has the reason"}
        try:
            self._send(reply)
        except ControlError:
            # Nobody waits for the answer any longer.
            logger.debug(event("command_unanswered", command=command))

    def _send(self, message: Mapping[str, Any]) -> None:
        if self._writer is None:
            raise ControlError("the process has ended")
        self._writer.write(json.dumps(message).encode() + b"\n")


class ControlPair:
    """Both ends, in the parent, until the worker has started.

    Attributes:
        worker: descriptor of the worker's end.
        parent: the parent's end.
    """

    def __init__(self) -> None:
        """Make the sockets.

        Raises:
            OSError: the process has no descriptor left.
        """
        self.parent, self._worker = socket.socketpair()
        self.worker = self._worker.fileno()

    def started(self) -> None:
        """Close the worker's end here, after the worker has started or failed to."""
        self._worker.close()
