"""What a good request gets, byte by byte, from a real codebook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from support.brute_force import nearest
from vqserve import payload
from vqserve.dtypes import BFLOAT16
from vqserve.layout import Layout, channel_axis
from vqserve.v1 import tokenizer_pb2 as pb

SHAPES = [(5, 4), (2, 3, 4), (2, 4, 3, 5), (2, 4, 2, 3, 2)]
LAYOUTS = {Layout.CHANNELS_FIRST: pb.LAYOUT_CHANNELS_FIRST, Layout.CHANNELS_LAST: pb.LAYOUT_CHANNELS_LAST}


@pytest.fixture
def tokenizer(fake: Callable[..., Any]) -> Any:
    return fake(300)


@pytest.fixture
def client(tokenizer: Any, serving: Callable[..., Any], connect: Callable[..., Any]) -> Any:
    return connect(serving(tokenizer).target)


def latents_of(shape: tuple[int, ...], dtype: int) -> tuple[np.ndarray, np.ndarray]:
    """What to send, and the numbers that it stands for."""
    values = np.random.default_rng(0).standard_normal(shape)
    if dtype == pb.DTYPE_BFLOAT16:
        bits = BFLOAT16.narrow(values.astype(np.float32))
        return bits, BFLOAT16.widen(bits)
    kind = {pb.DTYPE_FLOAT16: np.float16, pb.DTYPE_FLOAT32: np.float32, pb.DTYPE_FLOAT64: np.float64}[dtype]
    return values.astype(kind), values.astype(kind)


@pytest.mark.parametrize("dtype", sorted(payload.LATENT_DTYPES))
@pytest.mark.parametrize("shape", SHAPES)
def test_encode_every_rank_and_type_in_its_default_layout(
    client: Any, tokenizer: Any, shape: tuple[int, ...], dtype: int
) -> None:
    sent, meant = latents_of(shape, dtype)
    indices = client.encode(sent, dtype)
    assert indices.dtype == np.uint16
    axis = 1 if len(shape) >= 4 else -1
    np.testing.assert_array_equal(indices, nearest(np.moveaxis(meant, axis, -1), tokenizer.codes))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", [3, 4, 5])
def test_layouts_named_by_the_caller(client: Any, tokenizer: Any, rank: int, layout: Layout) -> None:
    shape = [2, 3, 5, 2, 3][:rank]
    shape[channel_axis(layout)] = 4
    sent, meant = latents_of(tuple(shape), pb.DTYPE_FLOAT32)
    indices = client.encode(sent, layout=LAYOUTS[layout])
    np.testing.assert_array_equal(indices, nearest(np.moveaxis(meant, channel_axis(layout), -1), tokenizer.codes))
    decoded = client.decode(indices, layout=LAYOUTS[layout])
    np.testing.assert_array_equal(np.moveaxis(decoded, channel_axis(layout), -1), tokenizer.codes[indices])


@pytest.mark.parametrize("dtype", [pb.DTYPE_UINT16, pb.DTYPE_UINT32, pb.DTYPE_INT32, pb.DTYPE_INT64])
def test_index_types(client: Any, tokenizer: Any, dtype: int) -> None:
    sent, meant = latents_of((6, 4), pb.DTYPE_FLOAT32)
    indices = client.encode(sent, index_dtype=dtype)
    assert payload.dtype_of(indices) == dtype
    np.testing.assert_array_equal(indices, nearest(meant, tokenizer.codes))
    np.testing.assert_array_equal(client.decode(indices), tokenizer.codes[indices])


def test_decode_in_every_type(client: Any, tokenizer: Any) -> None:
    indices = np.arange(300, dtype=np.int64).reshape(2, 15, 10)
    want = np.moveaxis(tokenizer.codes[indices], -1, 1)
    for dtype, kind in ((pb.DTYPE_FLOAT16, "f2"), (pb.DTYPE_FLOAT32, "f4"), (pb.DTYPE_FLOAT64, "f8")):
        np.testing.assert_array_equal(client.decode(indices, latent_dtype=dtype), want.astype(kind))
    np.testing.assert_array_equal(
        client.decode(indices, latent_dtype=pb.DTYPE_BFLOAT16), BFLOAT16.narrow(np.ascontiguousarray(want))
    )
    np.testing.assert_array_equal(client.decode(indices, output=pb.DECODE_OUTPUT_CODE_ROWS), -want)


def test_the_reply_has_digest_and_statistics(client: Any, tokenizer: Any) -> None:
    request = client.encode_request(np.zeros((3, 4), np.float32), expected_digest=tokenizer.info.digest)
    reply = client.stub.Encode(request)
    assert reply.digest == tokenizer.info.digest
    assert (reply.stats.batch_requests, reply.stats.batch_rows) == (1, 3)
    assert reply.stats.total_us >= reply.stats.queue_us + reply.stats.compute_us


def failed(client: Any, metadata: list[tuple[str, str]]) -> str:
    """The request id of a call that fails."""
    with pytest.raises(grpc.RpcError) as caught:
        client.stub.Encode(client.encode_request(np.zeros((3, 5), np.float32)), metadata=metadata)
    return dict(caught.value.trailing_metadata())["vqserve-request-id"]


def test_a_failed_request_comes_back_with_its_id(client: Any) -> None:
    assert failed(client, [("vqserve-request-id", "my.id-7")]) == "my.id-7"


@pytest.mark.parametrize("sent", [None, "", "with space", "x" * 65])
def test_a_failed_request_without_a_usable_id_gets_one(client: Any, sent: str | None) -> None:
    value = failed(client, [] if sent is None else [("vqserve-request-id", sent)])
    assert len(value) == 16
    int(value, 16)


@pytest.mark.parametrize("shape", [(0, 4), (0, 3, 4), (2, 4, 0, 3), (0, 4, 0, 0), (1, 4, 2, 0, 2)])
def test_an_empty_grid_is_answered_with_an_empty_array(client: Any, tokenizer: Any, shape: tuple[int, ...]) -> None:
    reply = client.stub.Encode(client.encode_request(np.zeros(shape, np.float32)))
    grid = shape[:1] + shape[2:] if len(shape) >= 4 else shape[:-1]
    assert (tuple(reply.shape), reply.indices, reply.digest) == (grid, b"", tokenizer.info.digest)
    reply = client.stub.Decode(client.decode_request(np.zeros(grid, np.int32)))
    assert (tuple(reply.shape), reply.latents, reply.digest) == (shape, b"", tokenizer.info.digest)
    assert not tokenizer.batches


def test_a_large_request_is_split_and_checked_off_the_loop(client: Any, tokenizer: Any) -> None:
    indices = np.random.default_rng(0).integers(0, 300, (1, 300, 1000), dtype=np.uint16)
    np.testing.assert_array_equal(np.moveaxis(client.decode(indices), 1, -1), tokenizer.codes[indices])
    assert max(map(len, tokenizer.batches)) <= 4 * 16384
    indices[0, 299, 999] = 300
    with pytest.raises(grpc.RpcError, match=r"indices\[0, 299, 999\] is 300"):
        client.decode(indices)


def test_list_codebooks(fake: Callable[..., Any], serving: Callable[..., Any], connect: Callable[..., Any]) -> None:
    client = connect(serving(fake(300, 4, name="b"), fake(16, 3, name="a")).target)
    listed = client.stub.ListCodebooks(pb.ListCodebooksRequest()).codebooks
    assert [(book.name, book.num_codes, book.input_dim, book.layout) for book in listed] == [
        ("a", 16, 3, 0),
        ("b", 300, 4, 0),
    ]
    assert listed[0].digest == f"{16:064x}"
    assert client.encode(np.zeros((2, 3), np.float32), codebook="a").dtype == np.uint8


def test_health_and_reflection(client: Any) -> None:
    health = health_pb2_grpc.HealthStub(client.channel)
    for service in ("", "vqserve.v1.TokenizerService"):
        reply = health.Check(health_pb2.HealthCheckRequest(service=service))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    reflection = reflection_pb2_grpc.ServerReflectionStub(client.channel)
    (reply,) = reflection.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = {service.name for service in reply.list_services_response.service}
    assert {"vqserve.v1.TokenizerService", "grpc.health.v1.Health"} <= names


def test_every_method_of_the_contract_is_served(client: Any) -> None:
    for method in pb.DESCRIPTOR.services_by_name["TokenizerService"].methods:
        call = client.channel.unary_unary(f"/vqserve.v1.TokenizerService/{method.name}")
        try:
            call(b"")
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT  # noqa: PT017
