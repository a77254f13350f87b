"""Server reflection, by which tools such as grpcurl learn what there is to call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from grpc_reflection.v1alpha import reflection, reflection_pb2

from vqserve_server.rpc.call import Call
from vqserve_server.rpc.failure import fail
from vqserve_server.rpc.messages import parse
from vqserve_server.rpc.transport import Handler


class Reflection:
    """Answers one question after another about some services."""

    def __init__(self, services: Iterable[str]) -> None:
        self._servicer = reflection.ReflectionServicer([*services, reflection.SERVICE_NAME])

    def handlers(self) -> Mapping[str, Handler]:
        """Return the handlers of all methods."""
        return {f"/{reflection.SERVICE_NAME}/ServerReflectionInfo": self._info}

    def _info(self, call: Call) -> None:
        def received(raw: bytes | None) -> None:
            if raw is None:
                call.end()
                return
            try:
                question = parse(reflection_pb2.ServerReflectionRequest, raw)
                (answer,) = self._servicer.ServerReflectionInfo(iter([question]), None)
            except Exception as error:
                fail(call, error)
            else:
                call.send(answer.SerializeToString(), lambda: call.receive(received))

        call.receive(received)
