"""Requests are what the client would send."""

from __future__ import annotations

import numpy as np
import pytest

from vqserve import payload, wire
from vqserve.dtypes import BFLOAT16
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_bench.served import decode_stats, encode_stats
from vqserve_bench.workload import Workload
from vqserve_client import Client, InvalidArgument
from vqserve_client.config import ClientConfig
from vqserve_data.errors import FileError


@pytest.fixture
def make(tiny):
    """Make requests for the tiny server's codebook: make(method="encode", grids=...) -> (requests, its info)."""

    def prepare(max_message_bytes=64 << 20, **what):
        with Client(tiny.target) as client:
            [info] = client.codebooks()
        config = ClientConfig(target=tiny.target, max_message_bytes=max_message_bytes)
        return Workload(**what).requests(info, config), info

    return prepare


@pytest.mark.parametrize("method", ["encode", "decode"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "bfloat16"])
@pytest.mark.parametrize("layout", [None, "channels_last"])
def test_requests(make, method, dtype, layout):
    grids = ((2, 3, 5), (1, 4), (1, 2, 3, 4), (7,))
    requests, info = make(method=method, grids=grids, dtype=dtype, layout=layout)
    assert [request.tokens for request in requests[:4]] == [30, 4, 24, 7]
    assert len(requests) == 8 * 4
    assert len({request.body for request in requests}) == len(requests)
    head, data = wire.read(pb.EncodeRequest if method == "encode" else pb.DecodeRequest, requests[0].body)
    assert (head.codebook, head.expected_digest) == (info.name, info.digest)
    array = payload.from_bytes(data, head.dtype, head.shape)
    if method == "encode":
        assert payload.dtype_name(head.dtype) == dtype
        assert array.shape == ((2, 4, 3, 5) if layout is None else (2, 3, 5, 4))
        values = BFLOAT16.widen(array) if dtype == "bfloat16" else array
        assert 0.5 < values.std() < 1.5
    else:
        assert payload.dtype_name(head.latent_dtype) == dtype
        assert array.shape == (2, 3, 5)
        assert 0 <= array.min() <= array.max() < info.vocab_size
    assert make(method=method, grids=grids, dtype=dtype, layout=layout)[0] == requests
    assert make(method=method, grids=grids, dtype=dtype, layout=layout, seed=1)[0] != requests


def test_data_of_a_file(make, tmp_path, latents):
    stored = latents(3, 4, 2, 2)
    np.save(tmp_path / "latents.npy", stored)
    requests, _ = make(method="encode", grids=((5,),), data=tmp_path / "latents.npy")
    rows = np.moveaxis(stored, 1, -1).reshape(-1, 4)
    for i, request in enumerate(requests):
        _, data = wire.read(pb.EncodeRequest, request.body)
        assert (np.frombuffer(data, "<f4").reshape(5, 4) == rows[(5 * i + np.arange(5)) % 12]).all()
    np.save(tmp_path / "indices.npy", np.arange(6).reshape(2, 3))
    requests, _ = make(method="decode", grids=((1, 4),), data=tmp_path / "indices.npy")
    assert wire.read(pb.DecodeRequest, requests[1].body)[1] == np.array([4, 5, 0, 1], "<i8").tobytes()


def test_data_from_all_over_a_file(make, tmp_path):
    # 1000 items of 2 tokens, each with its number in it.
    np.save(tmp_path / "latents.npy", np.repeat(np.arange(1000, dtype=np.float32), 8).reshape(1000, 4, 1, 2))
    requests, _ = make(method="encode", grids=((5,),), data=tmp_path / "latents.npy")
    numbers = {int(x) for r in requests for x in np.frombuffer(wire.read(pb.EncodeRequest, r.body)[1], "<f4")}
    assert numbers == {50 * i for i in range(20)}
    np.save(tmp_path / "indices.npy", np.repeat(np.arange(100), 8).reshape(100, 2, 4))
    requests, _ = make(method="decode", grids=((1, 4),), data=tmp_path / "indices.npy")
    numbers = {int(x) for r in requests for x in np.frombuffer(wire.read(pb.DecodeRequest, r.body)[1], "<i8")}
    assert numbers == {25 * i for i in range(4)}


def test_data_that_cannot_be(make, tmp_path, latents):
    for name, array in (("wide", latents(3, 5)), ("none", latents(0, 4)), ("indices", np.arange(4))):
        np.save(tmp_path / f"{name}.npy", array)
    encode = {"method": "encode", "grids": ((1, 4),)}
    with pytest.raises(InvalidArgument, match=r"wide\.npy: .*5 channels"):
        make(**encode, data=tmp_path / "wide.npy")
    with pytest.raises(InvalidArgument, match=r"none\.npy: it holds no tokens"):
        make(**encode, data=tmp_path / "none.npy")
    with pytest.raises(InvalidArgument, match="float32"):
        make(**encode, data=tmp_path / "indices.npy")
    with pytest.raises(InvalidArgument, match="integers"):
        make(method="decode", grids=((1, 4),), data=tmp_path / "wide.npy")
    with pytest.raises(FileError, match="there is no such file"):
        make(**encode, data=tmp_path / "missing.npy")


def test_grids_that_cannot_be(make):
    with pytest.raises(InvalidArgument, match="a grid of 1x99x99 or its reply does not fit a message of 4096 bytes"):
        make(max_message_bytes=4096, method="encode", grids=((1, 9), (1, 99, 99)))
    # The request would fit; the reply is eight times as large.
    with pytest.raises(InvalidArgument, match="its reply"):
        make(max_message_bytes=4096, method="decode", grids=((1, 1000),))


@pytest.mark.parametrize("nbytes", [0, 100, 1 << 20])
def test_stats(nbytes):
    stats = pb.ServedStats(queue_us=3, compute_us=5, total_us=9, batch_requests=2, batch_rows=7)
    data = b"x" * nbytes
    assert encode_stats(pb.EncodeResponse(digest="d", stats=stats, indices=data).SerializeToString()) == stats
    assert decode_stats(pb.DecodeResponse(digest="d", stats=stats, latents=data).SerializeToString()) == stats
    assert encode_stats(pb.EncodeResponse(digest="d", indices=data).SerializeToString()) is None
    assert encode_stats(b"\xff" * nbytes) is None
