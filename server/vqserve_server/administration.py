"""What an operator can make a running server do, by AdminService: in this process, or in all workers of its parent."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from google.protobuf import json_format

from vqserve.codebook_info import CodebookInfo
from vqserve.text import printable
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_server import event_log
from vqserve_server.control import DRAIN, LOG_LEVEL, RELOAD, STATUS, Control, ControlError
from vqserve_server.event_log import event
from vqserve_server.repository import ReloadCounts
from vqserve_server.rpc.admin import Answers

# A folder may have a hundred thousand files that are skipped, and a reply has room for fewer.
_MOST_PROBLEMS = 100

logger = logging.getLogger(__name__)


class Server(Protocol):
    """What is operated."""

    def info(self) -> pb.ServerInfo:
        """Return version, uptime and load."""

    def codebooks(self) -> list[CodebookInfo]:
        """Return what is served."""

    def refresh_access(self) -> list[str]:
        """Read certificates and tokens again; return why some cannot be used."""


@dataclass(kw_only=True)
class Administration:
    """Executes commands in one process.

    Attributes:
        server: what is operated.
        reload: loads what has changed, and returns what that did.
        drain: stops the process; with several, the parent does.
        drain_seconds: that the process may take to stop.
        worker: number of this process.
        parent: connection to the parent; None: this is the only process.
    """

    server: Server
    reload: Callable[[], Awaitable[ReloadCounts]]
    drain: Callable[[], None]
    drain_seconds: float
    worker: int = 0
    parent: Control | None = None

    def request(self, command: str, argument: str, then: Callable[[Answers], None], loop: Any) -> None:
        """Execute a command in all processes of the server, and call back with what each did. Any thread may call it.

        Args:
            command: one of `control`.
            argument: of the command.
            then: called on the event loop.
            loop: the event loop.
        """
        # After the stop there is no loop; gRPC cancels the call.
        with contextlib.suppress(RuntimeError):
            asyncio.run_coroutine_threadsafe(self._everywhere(command, argument, then), loop)

    async def _everywhere(self, command: str, argument: str, then: Callable[[Answers], None]) -> None:
        try:
            if self.parent is not None:
                answers = await self.parent.ask(command, argument)
            else:
                answers = [{"worker": self.worker, **await self.execute(command, argument)}]
        except Exception as error:
            if not isinstance(error, ControlError):
                logger.exception(event("command_failed", command=command))
            reason = str(error) if isinstance(error, ControlError) else "it failed; the log has the reason"
            answers = [{"worker": self.worker, "error": reason}]
        then(answers)
        if command == DRAIN and self.parent is None:
            self.drain()

    async def execute(self, command: str, argument: str) -> Mapping[str, Any]:
        """Execute a command in this process, and return the fields of its answer, but for a drain."""
        if command == STATUS:
            info = json_format.MessageToDict(self.server.info(), preserving_proto_field_name=True)
            state = {"pid": os.getpid(), "server": info, "log_level": event_log.level()}
            return state | self._codebooks()
        if command == RELOAD:
            problems = self.server.refresh_access()
            counts = await self.reload()
            return {**counts.numbers(), "problems": _shown(problems + counts.problems)} | self._codebooks()
        if command == LOG_LEVEL:
            return {"previous": event_log.set_level(argument)}
        if command == DRAIN:
            return {"requests": self.server.info().requests, "drain_seconds": self.drain_seconds}
        raise ValueError(f"there is no command {command}")

    def _codebooks(self) -> dict[str, Any]:
        live = [
            {"name": info.name, "digest": info.digest, "version": info.version or 0} for info in self.server.codebooks()
        ]
        return {"codebooks": live}


def _shown(problems: Sequence[str]) -> list[str]:
    """Return the first problems, without bytes of a name that no reply can carry, and how many more there are."""
    shown = [printable(problem) for problem in problems[:_MOST_PROBLEMS]]
    more = len(problems) - len(shown)
    return [*shown, f"and {more} more: the log has all"] if more else shown
