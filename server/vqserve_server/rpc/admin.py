"""The methods of AdminService: who may call them, and what they pass on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from vqserve.errors import AccessDenied, InvalidOption, Unavailable
from vqserve.v1 import admin_pb2 as pb
from vqserve_server.access import Tokens
from vqserve_server.config.values import LOG_LEVELS
from vqserve_server.control import DRAIN, LOG_LEVEL, RELOAD, STATUS
from vqserve_server.event_log import event
from vqserve_server.rpc.call import Call
from vqserve_server.rpc.messages import parse
from vqserve_server.rpc.transport import Handler

SERVICE = pb.DESCRIPTOR.services_by_name["AdminService"].full_name
# Seconds between two lines in the log about refused calls.
_LINE_S = 10.0

logger = logging.getLogger(__name__)

# What each process did: the fields of its entry in the reply.
Answers = Sequence[Mapping[str, Any]]
# Executes a command with its argument, and calls back with the answers, on any thread.
Execute = Callable[[str, str, Callable[[Answers], None]], None]


@dataclass(frozen=True)
class _Method:
    """One method: its messages and its command.

    Attributes:
        request: message of the request.
        response: message of the reply, with an entry for each process in `workers`.
        command: what the server does.
        argument: returns the command's argument from the request, or raises InvalidArgument.
    """

    request: type[Message]
    response: type[Message]
    command: str
    argument: Callable[[Any], str] = lambda _: ""


def _level(request: pb.SetLogLevelRequest) -> str:
    if request.level not in LOG_LEVELS:
        raise InvalidOption(f"{{option}} must be one of {', '.join(LOG_LEVELS)}", option="level")
    return request.level


_METHODS = {
    "Status": _Method(pb.StatusRequest, pb.StatusResponse, STATUS),
    "Reload": _Method(pb.ReloadRequest, pb.ReloadResponse, RELOAD),
    "SetLogLevel": _Method(pb.SetLogLevelRequest, pb.SetLogLevelResponse, LOG_LEVEL, _level),
    "Drain": _Method(pb.DrainRequest, pb.DrainResponse, DRAIN),
}


class AdminService:
    """Answers callers whose access token may operate the server.

    Its calls do not count among the others, so that an operator gets through to a server that is full.

    Attributes:
        execute: does what callers ask; None: the server is starting.
    """

    def __init__(self, tokens: Tokens | None) -> None:
        """Make it.

        Args:
            tokens: the access tokens; None: no caller has one, so none may call.
        """
        self.execute: Execute | None = None
        self._tokens = tokens
        self._lock = threading.Lock()
        self._next_line = 0.0

    def handlers(self) -> Mapping[str, Handler]:
        """Return the handlers of all methods."""
        return {f"/{SERVICE}/{name}": partial(self._handle, name, method) for name, method in _METHODS.items()}

    def _handle(self, name: str, method: _Method, call: Call) -> None:
        token = self._authorized(name, call)

        def received(raw: bytes) -> None:
            try:
                argument = method.argument(parse(method.request, raw))
                if self.execute is None:
                    raise Unavailable("the server is starting")
                fields = {"argument": argument} if argument else {}
                # What changes something is logged at the usual levels.
                level = logging.INFO if method.command == STATUS else logging.WARNING
                logger.log(level, event("admin_call", method=name, token=token, peer=call.caller.name, **fields))
                self.execute(method.command, argument, reply)
            except Exception as error:
                call.fail(error)

        def reply(answers: Answers) -> None:
            try:
                message = json_format.ParseDict({"workers": list(answers)}, method.response())
                call.end(message=message.SerializeToString())
            except Exception as error:
                call.fail(error)

        call.receive(received)

    def _authorized(self, name: str, call: Call) -> str:
        """Return the name of the caller's token.

        Raises:
            Unauthenticated: the caller has no valid token.
            AccessDenied: it has one that may not operate the server, or the server has no tokens.
        """
        if self._tokens is None:
            raise AccessDenied("only a server with access tokens (--tokens) can be operated by calls")
        token = self._tokens.authenticate(call.metadata, peer=call.caller.name)
        if not token.check().admin:
            self._log_refusal(name, token.name)
            raise AccessDenied(
                f"the access token {token.name} may not operate the server: its entry needs admin = true"
            )
        return token.name

    def _log_refusal(self, name: str, token: str) -> None:
        with self._lock:
            now = time.monotonic()
            if now < self._next_line:
                return
            self._next_line = now + _LINE_S
        logger.warning(event("admin_refused", method=name, token=token))
