"""TokenizerService: each method reads as what happens to a request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import grpc
import numpy as np

from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_server.engine import Engine, Job, Served
from vqserve_server.rpc.call import Call, Calls
from vqserve_server.rpc.decode import DecodeCall
from vqserve_server.rpc.encode import EncodeCall
from vqserve_server.rpc.messages import codebook_message, parse

SERVICE = pb.DESCRIPTOR.services_by_name["TokenizerService"].full_name
# Below it, looking at a payload takes less than handing it to another thread.
_INLINE_BYTES = 512 * 1024
_EMPTY = Served(array=np.empty(0, np.uint8), queue_us=0, compute_us=0, batch_requests=0, batch_rows=0)

T = TypeVar("T")


class TokenizerService:
    """Answers calls with an engine."""

    def __init__(self, engine: Engine, *, max_message_bytes: int) -> None:
        self._engine = engine
        self._max_message_bytes = max_message_bytes
        # A large payload is read and checked off the event loop, so that it does not hold up the small ones.
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="vqserve-payload")

    def handlers(self, calls: Calls) -> grpc.GenericRpcHandler:
        """Return the handlers of all methods."""
        methods = {"Encode": self.encode, "Decode": self.decode, "ListCodebooks": self.list_codebooks}
        return grpc.method_handlers_generic_handler(
            SERVICE, {name: calls.handler(name, method) for name, method in methods.items()}
        )

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def encode(self, raw: bytes, call: Call) -> bytes:
        """Latents to indices."""
        return await self._answer(EncodeCall, raw, call)

    async def decode(self, raw: bytes, call: Call) -> bytes:
        """Indices to latents."""
        return await self._answer(DecodeCall, raw, call)

    async def list_codebooks(self, raw: bytes, call: Call) -> bytes:
        """What is being served."""
        parse(pb.ListCodebooksRequest, raw)
        with self._engine.admit(len(raw)):
            codebooks = [codebook_message(info) for info in self._engine.live.infos()]
        return pb.ListCodebooksResponse(codebooks=codebooks).SerializeToString()

    async def _answer(self, kind: type[EncodeCall | DecodeCall], raw: bytes, call: Call) -> bytes:
        with self._engine.admit(len(raw)) as ticket:
            request = await self._run(
                len(raw), lambda: kind(raw, live=self._engine.live, max_message_bytes=self._max_message_bytes)
            )
            ticket.add(request.rows, request.reply_bytes)
            await self._run(len(raw), request.check)
            served = await self._compute(request.job(call.deadline)) if request.rows else _EMPTY
            return await self._run(request.reply_bytes, lambda: request.reply(served, call.elapsed_us()))

    async def _compute(self, job: Job) -> Served:
        self._engine.submit(job)
        try:
            return await asyncio.wrap_future(job.future)
        except asyncio.CancelledError:
            # The caller has left or its deadline has passed; the future is cancelled with the task that awaited it.
            self._engine.forget(job)
            raise

    async def _run(self, nbytes: int, work: Callable[[], T]) -> T:
        if nbytes <= _INLINE_BYTES:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)
