"""Requests to the server, and channels for them."""

from __future__ import annotations

from typing import Any

import grpc

from vqserve.v1 import tokenizer_pb2 as pb

MIB = 1 << 20
ENCODE = "/vqserve.v1.TokenizerService/Encode"
ENCODE_STREAM = "/vqserve.v1.TokenizerService/EncodeStream"
# Of the codebooks of cells.py: cheap to compute, and usual.
CHEAP, USUAL = "tiny", "ldm-f8"
CHANNELS = 4
_ROW_BYTES = 4 * CHANNELS
_SMALL_ROWS = 64


def encode_request(rows: int, book: str = USUAL) -> bytes:
    """Return a request with this many rows of random latents."""
    import numpy as np

    latents = np.random.default_rng(rows).standard_normal((rows, CHANNELS), dtype=np.float32)
    message = pb.EncodeRequest(codebook=book, dtype=pb.DTYPE_FLOAT32, shape=latents.shape)
    message.latents = latents.tobytes()
    return message.SerializeToString()


def rows_of(nbytes: int) -> int:
    """Return the rows of a request of this size."""
    return nbytes // _ROW_BYTES


def channel_options() -> list[tuple[str, Any]]:
    """Return the options of a channel with a connection of its own and no limit of its own."""
    return [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
    ]


def came_of_a_call(target: str) -> str:
    """Return the status of one small request over a connection of its own."""
    with open_channel(target) as channel:
        return came_of(channel)


def came_of(channel: grpc.Channel, request: bytes = b"", *, timeout_s: float = 10.0, **options: Any) -> str:
    """Return the status of one request, by default a small one.

    Args:
        channel: to the server.
        request: the message.
        timeout_s: deadline of the call.
        options: of gRPC's call.
    """
    try:
        channel.unary_unary(ENCODE)(request or encode_request(_SMALL_ROWS, CHEAP), timeout=timeout_s, **options)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def open_channel(target: str) -> grpc.Channel:
    return grpc.insecure_channel(target, options=channel_options())
