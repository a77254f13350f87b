"""Replies that do not fit their requests are never used."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from vqserve import payload
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_client import (
    Client,
    CodebookNotFound,
    DigestChanged,
    DigestMismatch,
    MessageTooLarge,
    ProtocolError,
    ServerError,
)

OTHER = "f" * 64


@pytest.mark.parametrize(
    ("lie", "text"),
    [
        ({"shape": [3]}, r"shape \(3,\)"),
        ({"shape": [1, 2]}, r"shape \(1, 2\)"),
        ({"shape": [1 << 63, 1 << 63]}, "shape"),
        ({"shape": []}, r"shape \(\)"),
        ({"dtype": pb.DTYPE_INT64}, "int64"),
        ({"dtype": 77}, "unknown dtype 77"),
        ({"dtype": 0}, "unspecified"),
        ({"indices": b""}, "has 0"),
        ({"indices": b"\0" * 3}, "has 3"),
        ({"indices": b"\0" * 5}, "has 5"),
        ({"indices": b"\xff\xff\0\0"}, "index 65535 in a vocabulary of 300"),
        ({"indices": b"\x2c\x01\0\0"}, "index 300 in"),
    ],
)
def test_a_lying_encode_reply(tiny, connect, lying, latents, lie, text):
    tiny.script.append(lying(**lie))
    with pytest.raises(ProtocolError, match=text) as caught:
        connect(tiny.target).encode(latents(2, 4))
    assert caught.value.codebook == "small"
    assert caught.value.request_id == tiny.request_ids[0]


@pytest.mark.parametrize("rows", [1, 7, 33_000])
@pytest.mark.parametrize("num_codes", [1, 16, 255, 1024, 1000])
def test_an_index_beyond_the_vocabulary_is_found_wherever_it_is(serve_tiny, codes, latents, num_codes, rows):
    server = serve_tiny(codes("book", num_codes))
    dtype = pb.DTYPE_UINT8 if num_codes <= 256 else pb.DTYPE_UINT16
    indices = np.full(rows, num_codes - 1, payload.numpy_dtype(dtype))
    digest = server.codes["book"].info.digest

    def reply(*_: object) -> pb.EncodeResponse:
        return pb.EncodeResponse(digest=digest, dtype=dtype, shape=[rows], indices=indices.tobytes())

    with Client(server.target) as client:
        server.script.append(reply)
        np.testing.assert_array_equal(client.encode(latents(rows, 4)), indices)
        for place in {0, rows // 2, rows - 1}:
            indices[place] = num_codes
            server.script.append(reply)
            with pytest.raises(ProtocolError, match=f"index {num_codes} in a vocabulary of {num_codes}"):
                client.encode(latents(rows, 4))
            indices[place] = num_codes - 1


@pytest.mark.parametrize(
    ("lie", "text"),
    [
        ({"shape": [2, 4]}, "shape"),
        ({"shape": [8, 2]}, "shape"),
        ({"dtype": pb.DTYPE_FLOAT64}, "float64"),
        ({"dtype": pb.DTYPE_UINT32}, "uint32"),
        ({"latents": b"\0" * 63}, "63"),
        ({"latents": b""}, "has 0"),
    ],
)
def test_a_lying_decode_reply(tiny, connect, lying, lie, text):
    tiny.script.append(lying(**lie))
    with pytest.raises(ProtocolError, match=text):
        connect(tiny.target).decode(np.arange(2))


@pytest.mark.parametrize(
    "lie",
    [
        {"name": ""},
        {"digest": ""},
        {"digest": "g" * 64},
        {"digest": "A" * 64},
        {"num_codes": 0},
        {"vocab_size": 0},
        {"vocab_size": (1 << 32) + 1},
        {"input_dim": 0},
        {"output_dim": 1 << 63},
        {"code_dim": 0},
        {"num_quantizers": 0},
        {"num_quantizers": (1 << 12) + 1},
        {"stage_vocab_sizes": [300, 5]},
        {"stage_vocab_sizes": [300]},
        {"num_quantizers": 3, "stage_vocab_sizes": [300, 5]},
        {"num_quantizers": 2, "stage_vocab_sizes": [300, 0]},
        {"num_quantizers": 2, "stage_vocab_sizes": [300, 301]},
        {"num_quantizers": 2, "stage_vocab_sizes": [5, 5]},
        {"layout": 9},
    ],
)
def test_a_list_that_cannot_be(tiny, connect, latents, lie):
    def change(reply: pb.ListCodebooksResponse) -> None:
        for name, value in lie.items():
            if isinstance(value, list):
                getattr(reply.codebooks[0], name).extend(value)
            else:
                setattr(reply.codebooks[0], name, value)

    client = connect(tiny.target)
    for call in (client.codebooks, lambda: client.encode(latents(2, 4))):
        tiny.list_script.append(change)
        with pytest.raises(ProtocolError, match="cannot be"):
            call()


def test_a_name_listed_twice(tiny, connect):
    tiny.list_script.append(lambda reply: reply.codebooks.append(reply.codebooks[0]))
    with pytest.raises(ProtocolError, match="twice"):
        connect(tiny.target).codebooks()


def test_absurd_widths_are_rejected_before_memory_is_asked_for(tiny, connect):
    tiny.replace("small", output_dim=1 << 31)
    with pytest.raises(ValueError, match="more than the client's limit of 67108864 bytes"):
        connect(tiny.target).decode(np.arange(4))


def test_a_digest_that_changes_between_the_chunks(tiny, connect, lying, latents):
    client = connect(tiny.target, max_message_bytes=1024, window=1)
    tiny.script.extend([lambda request, context, honest: honest(), lying(digest=OTHER)])
    with pytest.raises(DigestChanged, match="no longer has digest"):
        client.encode(latents(1000, 4))
    assert len(tiny.requests) == 2


def test_a_codebook_replaced_between_the_chunks(tiny, connect, latents):
    def replace_then(request, context, honest):
        tiny.replace("small", digest=OTHER)
        return tiny.script.clear() or honest()

    tiny.script.extend([lambda request, context, honest: honest(), replace_then])
    with pytest.raises(DigestChanged) as caught:
        connect(tiny.target, max_message_bytes=1024, window=1).encode(latents(1000, 4))
    assert caught.value.code == "FAILED_PRECONDITION"
    assert caught.value.request_id == tiny.request_ids[1]


def test_every_request_names_the_digest_from_the_start(tiny, connect, latents):
    connect(tiny.target, max_message_bytes=1024).encode(latents(1000, 4))
    assert {request.expected_digest for request in tiny.requests} == {tiny.codes["small"].info.digest}


def test_a_codebook_replaced_between_calls_is_followed(tiny, connect, latents):
    client = connect(tiny.target)
    first = client.encode(latents(5, 4))
    tiny.replace("small", digest=OTHER, output_dim=8)
    assert (client.encode(latents(5, 4)) == first).all()
    assert tiny.lists == 2


def test_a_codebook_replaced_by_one_of_other_widths_is_followed(serve_tiny, codes, connect, latents):
    server = serve_tiny(codes("one", 300, 4))
    client = connect(server.target)
    client.encode(latents(5, 4))
    server.codes["one"] = codes("one", 70000, 6)
    indices = client.encode(latents(5, 6))
    assert indices.dtype == np.uint32
    assert client.decode(indices).shape == (5, 12)
    with pytest.raises(ValueError, match="4 channels"):
        client.encode(latents(5, 4))


def test_a_server_that_never_means_what_it_lists(tiny, connect, lying, latents):
    tiny.script.extend([lying(digest=OTHER)] * 10)
    with pytest.raises(DigestChanged):
        connect(tiny.target).encode(latents(5, 4))
    assert len(tiny.requests) == 2


def test_a_pinned_digest(tiny, connect, lying, latents):
    digest = tiny.codes["small"].info.digest
    assert connect(tiny.target, digest=digest).encode(latents(5, 4)).shape == (5,)
    for client, options in ((connect(tiny.target, digest=OTHER), {}), (connect(tiny.target), {"digest": OTHER})):
        with pytest.raises(DigestMismatch, match=f"codebook 'small' has digest {digest}, not '{OTHER}'"):
            client.encode(latents(5, 4), **options)
    assert len(tiny.requests) == 1
    client = connect(tiny.target, digest=digest)
    tiny.script.append(lying(digest=OTHER))
    tiny.script.append(lying(digest=OTHER))
    with pytest.raises(DigestMismatch):
        client.encode(latents(5, 4))


def test_the_clients_digest_is_not_another_codebooks(serve_tiny, codes, connect, latents):
    a, b = codes("a", seed=1), codes("b", seed=2)
    client = connect(serve_tiny(a, b).target, codebook="a", digest=a.info.digest)
    assert (client.encode(latents(5, 4), codebook="b") == b.encode(latents(5, 4))).all()
    with pytest.raises(DigestMismatch):
        client.encode(latents(5, 4), codebook="b", digest=a.info.digest)


def test_a_reply_that_is_no_protobuf(connect, latents):
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: b"\xff\xff\xff")
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("vqserve.v1.TokenizerService", {"ListCodebooks": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(ProtocolError):
            connect(f"127.0.0.1:{port}").codebooks()
    finally:
        server.stop(None).wait()


def test_a_server_of_something_else(connect):
    server = grpc.server(ThreadPoolExecutor(2))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(ProtocolError) as caught:
            connect(f"127.0.0.1:{port}").codebooks()
        assert caught.value.code == "UNIMPLEMENTED"
    finally:
        server.stop(None).wait()


def test_a_server_whose_method_raises(tiny, connect, latents):
    def burst(request, context, honest):
        raise RuntimeError("scripted")

    tiny.script.append(burst)
    with pytest.raises(ServerError) as caught:
        connect(tiny.target).encode(latents(2, 4))
    assert caught.value.code == "UNKNOWN"
    assert len(tiny.requests) == 1


@pytest.mark.parametrize("sent", ["x" * 2003, "a b", "\u00e9", ""])
def test_a_request_id_that_is_none_is_dropped(tiny, connect, failing, latents, sent):
    client = connect(tiny.target)
    client.codebooks()
    tiny.script.append(failing("INTERNAL", vqserve_request_id=sent) if sent.isascii() else failing("INTERNAL"))
    with pytest.raises(ServerError) as caught:
        client.encode(latents(2, 4))
    assert caught.value.request_id == tiny.request_ids[-1]


def test_a_server_s_request_id(tiny, connect, failing, latents):
    tiny.script.append(failing("INTERNAL", vqserve_request_id="its-own.1"))
    with pytest.raises(ServerError) as caught:
        connect(tiny.target).encode(latents(2, 4))
    assert caught.value.request_id == "its-own.1"


def test_metadata_without_end(tiny, connect, failing, latents):
    tiny.script.extend([failing("INTERNAL", x="a" * 100_000)] * 9)
    with pytest.raises(ProtocolError, match="more metadata than gRPC accepts") as caught:
        connect(tiny.target).encode(latents(2, 4))
    assert len(str(caught.value)) < 500
    assert len(tiny.requests) == 1


ODD_TEXTS = ("evil\x1b[2J", "x" * 1_000_000, "line\nline", "a\u202eb")


@pytest.mark.parametrize("text", ODD_TEXTS, ids=["escape", "long", "line", "direction"])
@pytest.mark.parametrize("field", ["name", "kind"])
def test_a_list_with_texts_that_cannot_be_shown(tiny, connect, field, text):
    tiny.list_script.append(lambda reply: setattr(reply.codebooks[0], field, text))
    with pytest.raises(ProtocolError, match="cannot be") as caught:
        connect(tiny.target).codebooks()
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


def test_a_list_with_stages_without_end(tiny, connect):
    tiny.list_script.append(lambda reply: reply.codebooks[0].stage_vocab_sizes.extend([1] * 1_000_000))
    with pytest.raises(ProtocolError, match="cannot be") as caught:
        connect(tiny.target).codebooks()
    assert len(str(caught.value)) < 1000


def test_a_list_that_is_too_long(tiny, connect):
    tiny.list_script.append(lambda reply: setattr(reply.codebooks[0], "kind", "x" * (9 << 20)))
    with pytest.raises(ProtocolError, match=r"list of codebooks has 9437\d\d\d bytes, more than 5242880"):
        connect(tiny.target).codebooks()


@pytest.mark.parametrize(
    "reply",
    [
        bytes(60 << 20),
        b"\x78\x01" * (10 << 20),
        b"\x1a\x00" * (10 << 20),
        b"\x18\x01" * (10 << 20) + b"\xa2\x06\x01\0",
    ],
    ids=["zeros", "unknown fields", "empty shapes", "axes before a payload"],
)
def test_a_reply_of_very_many_fields(tiny, connect, latents, reply):
    """Each was read field by field, in Python, which no timeout and no Ctrl-C could end."""
    client = connect(tiny.target)
    client.codebooks()
    with RawServer(reply) as server:
        other = connect(server.target)
        other._core._catalogue = client._core._catalogue
        with pytest.raises(ProtocolError, match="not a valid message"):
            other.encode(latents(2, 4))


class RawServer:
    """Answers every Encode with these bytes."""

    def __init__(self, reply: bytes) -> None:
        handler = grpc.unary_unary_rpc_method_handler(lambda request, context: reply)
        self._server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.max_send_message_length", -1)])
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("vqserve.v1.TokenizerService", {"Encode": handler}),)
        )
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self):
        self._server.start()
        return self

    def __exit__(self, *_):
        self._server.stop(None).wait()


@pytest.mark.parametrize("times", [1, 4000])
def test_a_compressed_reply_is_limited_by_its_full_size(latents, times):
    zeros = bytes((1 << 10) * times)
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: zeros)
    server = grpc.server(ThreadPoolExecutor(2), compression=grpc.Compression.Gzip)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("vqserve.v1.TokenizerService", {"ListCodebooks": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    kind = ProtocolError if times == 1 else MessageTooLarge
    try:
        with Client(f"127.0.0.1:{port}", max_message_bytes=1 << 20) as client, pytest.raises(kind):
            client.codebooks()
    finally:
        server.stop(None).wait()


def test_a_list_of_very_many_names(tiny, connect, latents):
    def change(reply: pb.ListCodebooksResponse) -> None:
        for number in range(10_000):
            reply.codebooks.add().CopyFrom(reply.codebooks[0])
            reply.codebooks[-1].name = f"{'n' * 100}{number}"

    client = connect(tiny.target)
    tiny.list_script.append(change)
    with pytest.raises(CodebookNotFound, match="10001 codebooks are served") as caught:
        client.encode(latents(2, 4))
    assert len(str(caught.value)) < 2000
    tiny.list_script.append(lambda reply: [change(reply), change(reply)])
    with pytest.raises(ProtocolError, match="twice") as caught:
        client.codebooks()
    assert len(str(caught.value)) < 1000
