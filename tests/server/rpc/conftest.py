"""A raw stub: what any gRPC client could send."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from vqserve import payload
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve.v1 import tokenizer_pb2_grpc

_OPTIONS = [
    ("grpc.max_receive_message_length", 1 << 30),
    ("grpc.max_send_message_length", 1 << 30),
    # With the probe, gRPC sometimes buffers a whole large reply for a caller that does not read it.
    ("grpc.http2.bdp_probe", 0),
]


class RawClient:
    """Arrays to messages and back, without any of the SDK's care."""

    def __init__(self, target: str) -> None:
        self.channel = grpc.insecure_channel(target, options=_OPTIONS)
        self.stub = tokenizer_pb2_grpc.TokenizerServiceStub(self.channel)

    @staticmethod
    def encode_request(latents: np.ndarray, dtype: int = pb.DTYPE_FLOAT32, **fields: Any) -> pb.EncodeRequest:
        return pb.EncodeRequest(
            **{"dtype": dtype, "shape": latents.shape, "latents": payload.to_bytes(latents, dtype), **fields}
        )

    @staticmethod
    def decode_request(indices: np.ndarray, **fields: Any) -> pb.DecodeRequest:
        dtype = payload.dtype_of(indices)
        return pb.DecodeRequest(
            **{"dtype": dtype, "shape": indices.shape, "indices": payload.to_bytes(indices, dtype), **fields}
        )

    def encode(self, latents: np.ndarray, dtype: int = pb.DTYPE_FLOAT32, **fields: Any) -> np.ndarray:
        reply = self.stub.Encode(self.encode_request(latents, dtype, **fields))
        return payload.from_bytes(reply.indices, reply.dtype, reply.shape)

    def decode(self, indices: np.ndarray, **fields: Any) -> np.ndarray:
        reply = self.stub.Decode(self.decode_request(indices, **fields))
        return payload.from_bytes(reply.latents, reply.dtype, reply.shape)


@pytest.fixture
def connect() -> Iterator[Callable[[str], RawClient]]:
    clients: list[RawClient] = []

    def make(target: str) -> RawClient:
        clients.append(RawClient(target))
        return clients[-1]

    yield make
    for client in clients:
        client.channel.close()
