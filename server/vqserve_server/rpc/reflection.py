"""The service grpc.reflection.v1alpha.ServerReflection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from grpc_reflection.v1alpha import reflection, reflection_pb2

from vqserve_server.rpc.call import Call
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
        def received(raw: bytes) -> None:
            try:
                question = parse(reflection_pb2.ServerReflectionRequest, raw)
                (answer,) = self._servicer.ServerReflectionInfo(iter([question]), None)
            except Exception as error:
                call.fail(error)
            else:
                call.send(answer.SerializeToString(), receive)

        def receive() -> None:
            call.receive(received, at_end=call.end)

        receive()
