"""TokenizerService: what happens to a request of each method."""

from __future__ import annotations

from collections.abc import Mapping

from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_server.engine import Engine
from vqserve_server.rpc.call import Call
from vqserve_server.rpc.calls import Calls
from vqserve_server.rpc.decode import DecodePlan
from vqserve_server.rpc.encode import EncodePlan
from vqserve_server.rpc.messages import codebook_message, parse
from vqserve_server.rpc.plans import Plans
from vqserve_server.rpc.requests import Accept, Refuse, Requests
from vqserve_server.rpc.transport import Handler

SERVICE = pb.DESCRIPTOR.services_by_name["TokenizerService"].full_name


class TokenizerService:
    """Answers calls with an engine."""

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

    def handlers(self, calls: Calls) -> Mapping[str, Handler]:
        """Return the handlers of all methods."""
        return {
            f"/{SERVICE}/Encode": calls.unary(self._encode),
            f"/{SERVICE}/Decode": calls.unary(self._decode),
            f"/{SERVICE}/EncodeStream": calls.stream(self._encode),
            f"/{SERVICE}/DecodeStream": calls.stream(self._decode),
            f"/{SERVICE}/ListCodebooks": calls.plain(self._list_codebooks),
        }

    def close(self) -> None:
        """End what threads there are."""
        self._requests.close()

    def _encode(self, raw: bytes, call: Call, accept: Accept, refuse: Refuse) -> None:
        """Latents to indices."""
        self._requests.begin(self._encodings, raw, call, accept, refuse)

    def _decode(self, raw: bytes, call: Call, accept: Accept, refuse: Refuse) -> None:
        """Indices to latents."""
        self._requests.begin(self._decodings, raw, call, accept, refuse)

    def _list_codebooks(self, raw: bytes) -> bytes:
        """What is being served."""
        parse(pb.ListCodebooksRequest, raw)
        self._engine.admit(0, len(raw))
        try:
            codebooks = [codebook_message(info) for info in self._engine.live.infos()]
            return pb.ListCodebooksResponse(codebooks=codebooks).SerializeToString()
        finally:
            self._engine.release(0, len(raw))
