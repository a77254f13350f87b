"""TokenizerService: each method reads as what happens to a request."""

from __future__ import annotations

from typing import Any

import grpc

from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_server.engine import Engine
from vqserve_server.rpc.call import Call
from vqserve_server.rpc.calls import Calls
from vqserve_server.rpc.decode import DecodePlan
from vqserve_server.rpc.encode import EncodePlan
from vqserve_server.rpc.messages import codebook_message, parse
from vqserve_server.rpc.plans import Plans
from vqserve_server.rpc.requests import Requests
from vqserve_server.rpc.stream import Stream

SERVICE = pb.DESCRIPTOR.services_by_name["TokenizerService"].full_name


class TokenizerService:
    """Answers calls with an engine. Belongs to one event loop."""

    def __init__(self, engine: Engine, *, max_message_bytes: int) -> None:
        self._engine = engine
        self._max_message_bytes = max_message_bytes
        self._requests = Requests(engine)
        self.follow()

    def follow(self) -> None:
        """Serve what the engine has live now: requests that come from now on are read anew.

        A request that is being read keeps its plans, and adds its own to them only.
        """
        live, limit = self._engine.live, self._max_message_bytes
        self._encodings = Plans(EncodePlan, live=live, max_message_bytes=limit)
        self._decodings = Plans(DecodePlan, live=live, max_message_bytes=limit)

    def handlers(self, calls: Calls) -> grpc.GenericRpcHandler:
        """Return the handlers of all methods."""
        unary = {"Encode": self.encode, "Decode": self.decode, "ListCodebooks": self.list_codebooks}
        streams = {"EncodeStream": self.encode_stream, "DecodeStream": self.decode_stream}
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {name: calls.unary(name, method) for name, method in unary.items()}
            | {name: calls.stream(name, method) for name, method in streams.items()},
        )

    def close(self) -> None:
        """End what threads there are."""
        self._requests.close()

    async def encode(self, raw: bytes, call: Call) -> bytes:
        """Latents to indices."""
        return await self._reply(self._encodings, raw, call)

    async def decode(self, raw: bytes, call: Call) -> bytes:
        """Indices to latents."""
        return await self._reply(self._decodings, raw, call)

    async def _reply(self, plans: Plans[Any], raw: bytes, call: Call) -> bytes:
        request = await self._requests.begin(plans, raw, call)
        call.when_over.append(request.leave)
        return await request.reply()

    async def encode_stream(self, stream: Stream, deadline: float | None) -> None:
        """Latents to indices, again and again."""
        await stream.run(lambda raw: self._requests.begin(self._encodings, raw, Call.now(deadline)))

    async def decode_stream(self, stream: Stream, deadline: float | None) -> None:
        """Indices to latents, again and again."""
        await stream.run(lambda raw: self._requests.begin(self._decodings, raw, Call.now(deadline)))

    async def list_codebooks(self, raw: bytes, call: Call) -> bytes:
        """What is being served."""
        parse(pb.ListCodebooksRequest, raw)
        self._engine.admit(0, len(raw))
        try:
            codebooks = [codebook_message(info) for info in self._engine.live.infos()]
            return pb.ListCodebooksResponse(codebooks=codebooks).SerializeToString()
        finally:
            self._engine.release(0, len(raw))
