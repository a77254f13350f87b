"""Whatever is sent, the answer is a documented status and the server serves on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vqserve import wire
from vqserve.v1 import tokenizer_pb2 as pb

REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
}
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

lengths = st.one_of(st.integers(0, 5), st.sampled_from([1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]))
enums = st.one_of(st.integers(0, 10), st.integers(-(1 << 31), (1 << 31) - 1))
payloads = st.one_of(
    st.binary(max_size=64),
    # Of the sizes that small shapes have, so that more than the length check is reached.
    st.integers(0, 40).map(lambda n: bytes(4 * n)),
    st.integers(0, 40).map(lambda n: b"\x7f\xc0" * 2 * n),
)
shared = {
    "codebook": st.sampled_from(["", "fake", "nope", "é" * 40, "x" * 3000]),
    "expected_digest": st.sampled_from(["", f"{16:064x}", "00", "\x00"]),
    "layout": enums,
    "dtype": enums,
    "shape": st.lists(lengths, max_size=7),
}
encodes = st.builds(pb.EncodeRequest, **shared, index_dtype=enums, latents=payloads)
decodes = st.builds(pb.DecodeRequest, **shared, latent_dtype=enums, output=enums, indices=payloads)


@pytest.fixture
def client(fake: Callable[..., Any], serving: Callable[..., Any], connect: Callable[..., Any]) -> Any:
    return connect(serving(fake(16)).target)


def send(client: Any, method: str, raw: bytes) -> None:
    try:
        client.channel.unary_unary(f"/vqserve.v1.TokenizerService/{method}")(raw)
    except grpc.RpcError as error:
        assert error.code() in REFUSALS, error.details()  # noqa: PT017
        assert "vqserve-request-id" in dict(error.trailing_metadata())  # noqa: PT017


@FUZZ
@given(request=encodes)
def test_encode(client: Any, request: pb.EncodeRequest) -> None:
    send(client, "Encode", request.SerializeToString())


@FUZZ
@given(request=decodes)
def test_decode(client: Any, request: pb.DecodeRequest) -> None:
    send(client, "Decode", request.SerializeToString())


@FUZZ
@given(raw=st.binary(max_size=200), method=st.sampled_from(["Encode", "Decode", "ListCodebooks"]))
def test_random_bytes(client: Any, raw: bytes, method: str) -> None:
    send(client, method, raw)


@FUZZ
@given(data=st.data())
def test_a_good_request_with_damage(client: Any, data: st.DataObject) -> None:
    raw = bytearray(client.encode_request(np.ones((2, 4, 3, 1), np.float32), codebook="fake").SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    send(client, "Encode", bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    assert client.encode(np.zeros((2, 4), np.float32)).shape == (2,)


@pytest.mark.parametrize("rows", [0, 2])
@pytest.mark.parametrize(
    ("ending", "code"),
    [
        (bytes(16), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.EncodeRequest(codebook="n" * 14).SerializeToString(), grpc.StatusCode.NOT_FOUND),
    ],
)
def test_what_follows_the_payload_of_a_head_that_is_known(
    client: Any, rows: int, ending: bytes, code: grpc.StatusCode
) -> None:
    encode = client.channel.unary_unary("/vqserve.v1.TokenizerService/Encode")
    head = pb.EncodeRequest(dtype=pb.DTYPE_FLOAT32, shape=[rows, 4]).SerializeToString()
    known = head + wire.payload_tag(16 * rows) + bytes(16 * rows)
    encode(known)
    # As long as the message below, with a head as long: so the head of that one is looked up where it ends.
    half = pb.EncodeRequest(dtype=pb.DTYPE_FLOAT16, shape=[2 * rows + 2, 4], latents=bytes(16 * rows + 16))
    assert len(half.SerializeToString()) == len(known + ending)
    client.stub.Encode(half)
    with pytest.raises(grpc.RpcError) as caught:
        encode(known + ending)
    assert caught.value.code() is code
