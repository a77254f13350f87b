"""What surrounds every call of the TokenizerService: its deadline, and how it ends if it fails."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, NoReturn

import grpc

from vqserve_server.engine import BatchFailed
from vqserve_server.rpc.status import status_of

REQUEST_ID_KEY = "vqserve-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
# gRPC tells "no deadline" as one that is centuries away.
_NO_DEADLINE_S = 1e9

logger = logging.getLogger(__name__)


class Call(NamedTuple):
    """One call, as its method sees it.

    Attributes:
        arrived: time.monotonic() seconds.
        deadline: the same clock; None: the caller waits for ever.
    """

    arrived: float
    deadline: float | None

    def elapsed_us(self) -> int:
        """Return the microseconds since the arrival."""
        return round((time.monotonic() - self.arrived) * 1e6)


Method = Callable[[bytes, Call], Awaitable[bytes]]


class Calls:
    """Wraps methods into gRPC handlers, and knows how many calls are being answered.

    Handlers take and return raw bytes: a message that is no protobuf is then an error like any other, where gRPC's own
    deserializing would answer UNKNOWN with the text of the exception.
    """

    def __init__(self) -> None:
        self._active = 0
        self._idle: asyncio.Event | None = None

    async def wait_idle(self) -> None:
        """Wait until no call is being answered."""
        if self._active:
            self._idle = asyncio.Event()
            await self._idle.wait()

    def handler(self, name: str, method: Method) -> grpc.RpcMethodHandler[bytes, bytes]:
        """Return the handler of a unary method."""

        async def answer(raw: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            self._active += 1
            try:
                arrived = time.monotonic()
                remaining = context.time_remaining()
                deadline = None if remaining is None or remaining > _NO_DEADLINE_S else arrived + remaining
                return await method(raw, Call(arrived, deadline))
            except Exception as error:
                await _fail(name, error, context)
            finally:
                self._active -= 1
                if not self._active and self._idle is not None:
                    self._idle.set()

        return grpc.unary_unary_rpc_method_handler(answer)


async def _fail(name: str, error: Exception, context: grpc.aio.ServicerContext[bytes, bytes]) -> NoReturn:
    # Only here: reading and writing metadata would take a good part of a small call.
    request_id = _request_id(context)
    status = status_of(error, request_id=request_id)
    if status.code is grpc.StatusCode.INTERNAL:
        # What a batch failed of was logged once, by the engine.
        known = isinstance(error, BatchFailed)
        logger.error("request %s %s failed", request_id, name, exc_info=None if known else error)
    else:
        logger.debug("request %s %s: %s: %s", request_id, name, status.code.name, status.details)
    await context.abort(status.code, status.details, ((REQUEST_ID_KEY, request_id), *status.metadata))


def _request_id(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and _REQUEST_ID.fullmatch(value):
            return value
    return secrets.token_hex(8)
