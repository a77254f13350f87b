"""TokenizerService: each method reads as what happens to a request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc

from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_server.engine import Engine, Job, Served
from vqserve_server.errors import VqserveError
from vqserve_server.rpc.call import Call, Calls
from vqserve_server.rpc.decode import DecodePlan
from vqserve_server.rpc.encode import EncodePlan
from vqserve_server.rpc.messages import codebook_message, parse
from vqserve_server.rpc.plan import Plan
from vqserve_server.rpc.plans import Plans

SERVICE = pb.DESCRIPTOR.services_by_name["TokenizerService"].full_name
# Below it, looking at a payload takes less than handing it to another thread.
_INLINE_BYTES = 512 * 1024

T = TypeVar("T")


class TokenizerService:
    """Answers calls with an engine. Belongs to one event loop."""

    def __init__(self, engine: Engine, *, max_message_bytes: int) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._encodings = Plans(EncodePlan, live=engine.live, max_message_bytes=max_message_bytes)
        self._decodings = Plans(DecodePlan, live=engine.live, max_message_bytes=max_message_bytes)
        self._arrived: list[Job] = []
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
        return await self._answer(self._encodings, raw, call)

    async def decode(self, raw: bytes, call: Call) -> bytes:
        """Indices to latents."""
        return await self._answer(self._decodings, raw, call)

    async def list_codebooks(self, raw: bytes, call: Call) -> bytes:
        """What is being served."""
        parse(pb.ListCodebooksRequest, raw)
        self._engine.admit(0, len(raw))
        try:
            codebooks = [codebook_message(info) for info in self._engine.live.infos()]
            return pb.ListCodebooksResponse(codebooks=codebooks).SerializeToString()
        finally:
            self._engine.release(0, len(raw))

    async def _answer(self, plans: Plans[Any], raw: bytes, call: Call) -> bytes:
        is_large = len(raw) > _INLINE_BYTES
        known = plans.known(raw)
        if known is None:
            known = await self._elsewhere(lambda: plans.read(raw)) if is_large else plans.read(raw)
            plans.keep(raw, *known)
        plan, data = known
        rows, nbytes = plan.rows, len(raw) + plan.reply_bytes
        self._engine.admit(rows, nbytes)
        try:
            if not rows:
                return plan.reply(None, call.elapsed_us())
            array = plan.array(data)
            if is_large:
                await self._elsewhere(lambda: plan.check(array))
            else:
                plan.check(array)
            served = await self._compute(plan, array, call)
            if plan.reply_bytes > _INLINE_BYTES:
                return await self._elsewhere(lambda: plan.reply(served, call.elapsed_us()))
            return plan.reply(served, call.elapsed_us())
        finally:
            self._engine.release(rows, nbytes)

    async def _compute(self, plan: Plan[Any], array: Any, call: Call) -> Served:
        answer: asyncio.Future[Served] = self._loop.create_future()
        job = plan.job(array, deliver=self._deliver, tag=answer, deadline=call.deadline)
        # Whatever the loop has ready goes to the engine together.
        if not self._arrived:
            self._loop.call_soon(self._submit)
        self._arrived.append(job)
        try:
            return await answer
        except asyncio.CancelledError:
            # The caller has left or its deadline has passed.
            self._engine.forget(job)
            raise

    def _submit(self) -> None:
        jobs, self._arrived = self._arrived, []
        try:
            self._engine.submit(jobs)
        except VqserveError as error:
            for job in jobs:
                job.fail(type(error)(*error.args))

    def _deliver(self, jobs: list[Job]) -> None:
        # One wake-up of the loop for all jobs of a batch.
        self._loop.call_soon_threadsafe(_hand_over, jobs)

    async def _elsewhere(self, work: Callable[[], T]) -> T:
        return await self._loop.run_in_executor(self._pool, work)


def _hand_over(jobs: list[Job]) -> None:
    for job in jobs:
        answer, outcome = job.tag, job.outcome
        if answer.done():
            continue
        if isinstance(outcome, BaseException):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)
