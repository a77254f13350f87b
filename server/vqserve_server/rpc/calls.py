"""What surrounds every call of the TokenizerService: its deadline, how it ends if it fails, and the server's end."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import NoReturn

import grpc

from vqserve_server.engine import BatchFailed
from vqserve_server.rpc.call import Call
from vqserve_server.rpc.status import status_of
from vqserve_server.rpc.stream import Stream

REQUEST_ID_KEY = "vqserve-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
# gRPC tells "no deadline" as one that is centuries away.
_NO_DEADLINE_S = 1e9
# Replies up to here count as sent when they are made: to be told of it costs as much as a good part of a small call.
_SMALL_BYTES = 1 << 16

logger = logging.getLogger(__name__)


Context = grpc.aio.ServicerContext[bytes, bytes]
Method = Callable[[bytes, Call], Awaitable[bytes]]
StreamMethod = Callable[[Stream, float | None], Awaitable[None]]


class Calls:
    """Wraps methods into gRPC handlers, and knows which calls are being answered.

    Handlers take and return raw bytes: a message that is no protobuf is then an error like any other, where gRPC's own
    deserializing would answer UNKNOWN with the text of the exception.
    """

    def __init__(self) -> None:
        self._active = 0
        self._streams: set[Stream] = set()
        self._draining = False
        self._idle: asyncio.Event | None = None

    async def drain(self) -> None:
        """Let streams end after what they have read, and wait until no call is being answered."""
        self._draining = True
        for stream in self._streams:
            stream.drain()
        if self._active:
            self._idle = asyncio.Event()
            await self._idle.wait()

    def unary(self, name: str, method: Method) -> grpc.RpcMethodHandler[bytes, bytes]:
        """Return the handler of a method with one request and one reply."""

        async def answer(raw: bytes, context: Context) -> bytes:
            self._active += 1
            call = Call.now(_deadline(context))
            call.when_over.append(self._left)
            is_over = True
            try:
                reply = await method(raw, call)
                if len(reply) > _SMALL_BYTES:
                    # The stubs have a class where gRPC takes any function.
                    context.add_done_callback(lambda _: call.over())  # type: ignore[arg-type]
                    is_over = False
                return reply
            except Exception as error:
                await _fail(name, error, context)
            finally:
                if is_over:
                    call.over()

        return grpc.unary_unary_rpc_method_handler(answer)

    def stream(self, name: str, method: StreamMethod) -> grpc.RpcMethodHandler[bytes, bytes]:
        """Return the handler of a method with many requests and as many replies."""

        async def answer(_requests: object, context: Context) -> None:
            self._active += 1
            stream = Stream(context)
            self._streams.add(stream)
            # One that says nothing would be waited for otherwise.
            if self._draining:
                stream.drain()
            try:
                await method(stream, _deadline(context))
            except Exception as error:
                await _fail(name, error, context)
            finally:
                self._streams.discard(stream)
                self._left()

        return grpc.stream_stream_rpc_method_handler(answer)

    def _left(self) -> None:
        self._active -= 1
        if not self._active and self._idle is not None:
            self._idle.set()


def _deadline(context: Context) -> float | None:
    remaining = context.time_remaining()
    return None if remaining is None or remaining > _NO_DEADLINE_S else time.monotonic() + remaining


async def _fail(name: str, error: Exception, context: Context) -> NoReturn:
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


def _request_id(context: Context) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and _REQUEST_ID.fullmatch(value):
            return value
    return secrets.token_hex(8)
