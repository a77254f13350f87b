"""What a bad request gets; docs/operations.md has the table. The server serves on after each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_server.errors import NonFiniteLatents
from vqserve_server.quantizers import Quantizer, ResidualQuantizer, VectorQuantizerWithInputProjection
from vqserve_server.tokenizer import Tokenizer

INVALID = grpc.StatusCode.INVALID_ARGUMENT
F32 = pb.DTYPE_FLOAT32
ONE = np.zeros((1, 4), np.float32).tobytes()
NAN16 = np.array([[0, 0, np.nan, 0]], np.float16).tobytes()

REFUSED_ENCODES: dict[str, tuple[dict[str, Any], grpc.StatusCode, str]] = {
    "nothing at all": ({}, INVALID, "dtype must be one of float32, float16, bfloat16, float64, not unspecified"),
    "no shape": ({"dtype": F32}, INVALID, "2 to 5 axes, not 0"),
    "one axis": ({"dtype": F32, "shape": [4], "latents": ONE}, INVALID, "2 to 5 axes, not 1"),
    "a million axes": ({"dtype": F32, "shape": [1] * 10**6, "latents": ONE}, INVALID, "65536 bytes beside its payload"),
    "a thousand axes": ({"dtype": F32, "shape": [1] * 1000, "latents": ONE}, INVALID, "not 1000"),
    "integers": ({"dtype": pb.DTYPE_INT32, "shape": [1, 4], "latents": ONE}, INVALID, "not int32"),
    "no such type": ({"dtype": 77, "shape": [1, 4], "latents": ONE}, INVALID, "unknown dtype 77"),
    "no such layout": ({"dtype": F32, "shape": [1, 4], "layout": 9, "latents": ONE}, INVALID, "unknown layout 9"),
    "2^40 elements claimed": (
        {"dtype": F32, "shape": [1 << 38, 4], "latents": ONE},
        INVALID,
        "is 4398046511104 bytes, the payload has 16",
    ),
    "a size that overflows": ({"dtype": F32, "shape": [1 << 62, 1 << 62], "latents": ONE}, INVALID, "the payload"),
    "nothing of 2^63 by 2^63": ({"dtype": F32, "shape": [0, 1 << 63, 1 << 63, 4]}, INVALID, "too large"),
    "truncated payload": (
        {"dtype": F32, "shape": [1, 4], "latents": ONE[:-1]},
        INVALID,
        "is 16 bytes, the payload has 15",
    ),
    "payload too long": ({"dtype": F32, "shape": [1, 4], "latents": ONE + b"x"}, INVALID, "the payload has 17"),
    "wrong channels": (
        {"dtype": F32, "shape": [1, 4, 1, 1], "layout": pb.LAYOUT_CHANNELS_LAST, "latents": ONE},
        INVALID,
        'have 1 channels in layout channels_last, the codebook takes 4: should it be layout="channels_first"?',
    ),
    "no channels": ({"dtype": F32, "shape": [1, 0], "latents": b""}, INVALID, "have 0 channels"),
    "empty with wrong channels": ({"dtype": F32, "shape": [0, 3], "latents": b""}, INVALID, "have 3 channels"),
    "channels first on two axes": (
        {"dtype": F32, "shape": [1, 4], "layout": pb.LAYOUT_CHANNELS_FIRST, "latents": ONE},
        INVALID,
        "channels_first needs at least 3 axes",
    ),
    "NaN": (
        {"dtype": pb.DTYPE_FLOAT16, "shape": [1, 4, 1, 1], "latents": NAN16},
        INVALID,
        "latents[0, 2, 0, 0] is nan",
    ),
    "infinity": (
        {"dtype": pb.DTYPE_FLOAT64, "shape": [1, 4], "latents": np.array([0, 0, 0, -np.inf]).tobytes()},
        INVALID,
        "latents[0, 3] is -inf",
    ),
    "bfloat16 NaN": (
        {"dtype": pb.DTYPE_BFLOAT16, "shape": [1, 4], "latents": np.array([0, 0x7F81, 0, 0], "<u2").tobytes()},
        INVALID,
        "latents[0, 1] is nan",
    ),
    "an index type that is too small": (
        {"dtype": F32, "shape": [1, 4], "index_dtype": pb.DTYPE_UINT8, "latents": ONE},
        INVALID,
        "index_dtype uint8 does not hold the vocabulary of 300 indices",
    ),
    "a floating index type": (
        {"dtype": F32, "shape": [1, 4], "index_dtype": F32, "latents": ONE},
        INVALID,
        "index_dtype must be one of uint8, uint16, uint32, int32, int64, not float32",
    ),
    "unknown codebook": (
        {"codebook": "nope\n", "dtype": F32, "shape": [1, 4], "latents": ONE},
        grpc.StatusCode.NOT_FOUND,
        r"no codebook 'nope\n' is served, only: fake",
    ),
    "wrong digest": (
        {"expected_digest": "ab" * 32, "dtype": F32, "shape": [1, 4], "latents": ONE},
        grpc.StatusCode.FAILED_PRECONDITION,
        f"codebook 'fake' has digest {300:064x}, not '{'ab' * 32}'",
    ),
}

REFUSED_DECODES: dict[str, tuple[dict[str, Any], grpc.StatusCode, str]] = {
    "nothing at all": ({}, INVALID, "dtype must be one of uint8, uint16, uint32, int32, int64, not unspecified"),
    "no axes": ({"dtype": pb.DTYPE_UINT8, "indices": b"\0"}, INVALID, "1 to 4 axes, not 0"),
    "five axes": ({"dtype": pb.DTYPE_UINT8, "shape": [1] * 5, "indices": b"\0"}, INVALID, "1 to 4 axes, not 5"),
    "floats": ({"dtype": F32, "shape": [1], "indices": b"\0\0\0\0"}, INVALID, "not float32"),
    "negative index": (
        {"dtype": pb.DTYPE_INT64, "shape": [1, 2], "indices": np.array([3, -1]).tobytes()},
        INVALID,
        "indices[0, 1] is -1, not in [0, 300)",
    ),
    "index = K": (
        {"dtype": pb.DTYPE_UINT16, "shape": [1], "indices": np.array([300], "<u2").tobytes()},
        INVALID,
        "indices[0] is 300, not in [0, 300)",
    ),
    "index = 2^32 - 1": (
        {"dtype": pb.DTYPE_UINT32, "shape": [1], "indices": b"\xff" * 4},
        INVALID,
        "indices[0] is 4294967295",
    ),
    "2^40 elements claimed": (
        {"dtype": pb.DTYPE_UINT8, "shape": [1 << 40], "indices": b"\0"},
        INVALID,
        "1099511627776",
    ),
    "nothing of 2^63 by 2^63": ({"dtype": pb.DTYPE_UINT8, "shape": [0, 1 << 63, 1 << 63]}, INVALID, "too large"),
    "truncated payload": ({"dtype": pb.DTYPE_INT32, "shape": [1], "indices": b"\0"}, INVALID, "the payload has 1"),
    "integer latents": (
        {"dtype": pb.DTYPE_UINT8, "shape": [1], "latent_dtype": pb.DTYPE_UINT8, "indices": b"\0"},
        INVALID,
        "latent_dtype must be one of float32, float16, bfloat16, float64, not uint8",
    ),
    "no such output": (
        {"dtype": pb.DTYPE_UINT8, "shape": [1], "output": 5, "indices": b"\0"},
        INVALID,
        "unknown output 5",
    ),
    "a reply that fits no message": (
        {"dtype": pb.DTYPE_UINT8, "shape": [1 << 16], "indices": bytes(1 << 16)},
        INVALID,
        "the reply would have 1048576 bytes, and the server's limit of 1048576 has room for 1048064: "
        "send fewer tokens at once (the SDK does with max_message_bytes=1048576), or start the server with a larger "
        "--max-message-bytes",
    ),
    "unknown codebook": (
        {"codebook": "x" * 10_000, "dtype": pb.DTYPE_UINT8, "shape": [1], "indices": b"\0"},
        grpc.StatusCode.NOT_FOUND,
        "is served, only: fake",
    ),
}


@pytest.fixture
def client(fake: Callable[..., Any], serving: Callable[..., Any], connect: Callable[..., Any]) -> Any:
    return connect(serving(fake(300), max_message_bytes=1 << 20, max_queue_bytes=1 << 22).target)


def assert_refused(call: Callable[[], Any], code: grpc.StatusCode, text: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() is code
    assert text in caught.value.details()
    metadata = dict(caught.value.trailing_metadata())
    assert metadata.keys() == {"vqserve-request-id", "vqserve-error"}
    assert metadata["vqserve-request-id"]


def assert_serving(client: Any) -> None:
    assert client.encode(np.zeros((2, 4, 3, 3), np.float32)).shape == (2, 3, 3)
    assert client.decode(np.zeros((2, 3, 3), np.uint8)).shape == (2, 4, 3, 3)


@pytest.mark.parametrize("name", REFUSED_ENCODES)
def test_rejected_encodes(client: Any, name: str) -> None:
    fields, code, text = REFUSED_ENCODES[name]
    assert_refused(lambda: client.stub.Encode(pb.EncodeRequest(**fields)), code, text)
    assert_serving(client)


@pytest.mark.parametrize("name", REFUSED_DECODES)
def test_rejected_decodes(client: Any, name: str) -> None:
    fields, code, text = REFUSED_DECODES[name]
    assert_refused(lambda: client.stub.Decode(pb.DecodeRequest(**fields)), code, text)
    assert_serving(client)


def test_all_of_them_in_a_row(client: Any) -> None:
    for call, kind, rejected in (
        (client.stub.Encode, pb.EncodeRequest, REFUSED_ENCODES),
        (client.stub.Decode, pb.DecodeRequest, REFUSED_DECODES),
    ):
        for fields, code, text in rejected.values():
            request = kind(**fields)
            assert_refused(lambda call=call, request=request: call(request), code, text)
    assert_serving(client)


@pytest.mark.parametrize("method", ["Encode", "Decode", "ListCodebooks"])
@pytest.mark.parametrize("raw", [b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02\xff\xfe", b"\x2a\x01\x80"])
def test_bytes_that_are_no_message(client: Any, method: str, raw: bytes) -> None:
    call = client.channel.unary_unary(f"/vqserve.v1.TokenizerService/{method}")
    if method == "ListCodebooks" and raw == b"\x0a\x02\xff\xfe":
        call(raw)  # an unknown field is no error: a later client may send it
    elif method == "ListCodebooks" and raw == b"\x2a\x01\x80":
        call(raw)
    else:
        assert_refused(lambda: call(raw), INVALID, "the request is not a valid")
    assert_serving(client)


@pytest.mark.parametrize("max_batch_rows", [5, 16384])
@pytest.mark.parametrize(
    "make",
    [lambda: VectorQuantizerWithInputProjection(6, 40, 2), lambda: ResidualQuantizer(3, 40, 6)],
    ids=["projection", "stages"],
)
def test_a_token_beyond_float32_is_named_as_in_process(
    make: Callable[[], Quantizer], max_batch_rows: int, serving: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        quantizer = make().requires_grad_(False)
        for parameter in quantizer.parameters():
            parameter.normal_()
    tokenizer = Tokenizer(quantizer, device="cpu")
    client = connect(serving(tokenizer, max_batch_rows=max_batch_rows).target)
    latents = np.zeros((2, 6, 3, 3), np.float32)
    latents[1, :, 2, 0] = 3.4e38
    latents[1, ::2, 2, 0] *= -1
    with pytest.raises(NonFiniteLatents, match=r"token \[1, 2, 0\]") as caught:
        tokenizer.encode(latents)
    assert_refused(lambda: client.encode(latents), INVALID, caught.value.message)


def test_a_message_beyond_the_limit(client: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.encode(np.zeros((1 << 17, 4), np.float32))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert_serving(client)


def test_no_name_and_two_codebooks(
    fake: Callable[..., Any], serving: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    client = connect(serving(fake(name="b"), fake(name="a")).target)
    call = lambda: client.encode(np.zeros((1, 4), np.float32))  # noqa: E731
    assert_refused(call, grpc.StatusCode.NOT_FOUND, "2 codebooks are served, choose one with codebook=: a, b")


def test_a_sentinel_is_emitted_and_not_decoded(
    fake: Callable[..., Any], serving: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    client = connect(serving(fake(16, decodable=10)).target)
    client.decode(np.array([9], np.uint8))
    assert_refused(lambda: client.decode(np.array([10], np.uint8)), INVALID, "not in [0, 10)")
