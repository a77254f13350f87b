"""Residual codebooks behind a server: a token's indices are an axis, in the place of the channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vqserve_client import InvalidArgument
from vqserve_client.cli import main
from vqserve_server.errors import InvalidOption, InvalidShape
from vqserve_server.quantizers import ResidualQuantizer, VectorQuantizer
from vqserve_server.tokenizer import Tokenizer

STAGES, CHANNELS = 5, 6


def make(num_quantizers=STAGES, layout=None):
    torch.manual_seed(1)
    quantizer = ResidualQuantizer(num_quantizers, 300, CHANNELS)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.normal_()
    if layout is not None:
        quantizer.layout = layout
    return Tokenizer(quantizer, name="audio", device="cpu")


@pytest.fixture
def tokenizer():
    return make()


@pytest.mark.parametrize("layout", ["channels_first", "channels_last", None])
@pytest.mark.parametrize("shape", [(9, 6), (2, 6, 6), (2, 6, 3, 6), (1, 6, 2, 3, 6)])
@pytest.mark.parametrize("count", [1, 3, None])
def test_remote_is_local(serving, connect, latents, tokenizer, layout, shape, count):
    client = connect(serving(tokenizer).target)
    assert client.codebooks() == [tokenizer.info]
    array = latents(*shape)
    layout = layout if len(shape) > 2 else None
    indices = client.encode(array, layout=layout, num_quantizers=count)
    assert indices.dtype == np.uint16
    np.testing.assert_array_equal(indices, tokenizer.encode(array, layout=layout, num_quantizers=count))
    every = tokenizer.encode(array, layout=layout)
    for dtype in ("float32", "bfloat16"):
        expected = tokenizer.decode(every, layout=layout, num_quantizers=count, dtype=dtype)
        # The indices that are used, and more of them than are used.
        for given in (indices, every):
            decoded = client.decode(given, layout=layout, num_quantizers=count, dtype=dtype)
            np.testing.assert_array_equal(decoded, expected)


def test_the_layout_of_the_file(serving, connect, latents):
    tokenizer = make(layout="channels_first")
    client = connect(serving(tokenizer).target)
    indices = client.encode(latents(2, 6, 7))
    assert indices.shape == (2, STAGES, 7)
    assert client.decode(indices).shape == (2, 6, 7)


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_cut_into_requests(serving, connect, latents, tokenizer, layout):
    client = connect(serving(tokenizer).target, max_message_bytes=1500)
    array = latents(3, 6, 40, 6)
    indices = client.encode(array, layout=layout, num_quantizers=4)
    np.testing.assert_array_equal(indices, tokenizer.encode(array, layout=layout, num_quantizers=4))
    for count in (2, 4):
        decoded = client.decode(indices, layout=layout, num_quantizers=count)
        np.testing.assert_array_equal(decoded, tokenizer.decode(indices, layout=layout, num_quantizers=count))


def test_batches_cut_inside_images(serving, connect, latents, tokenizer):
    client = connect(serving(tokenizer, max_batch_rows=16).target)
    array = latents(3, 6, 5, 7)
    indices = client.encode(array)
    np.testing.assert_array_equal(indices, tokenizer.encode(array))
    np.testing.assert_array_equal(client.decode(indices), tokenizer.decode(indices))


def test_many_and_torch(serving, connect, latents, tokenizer):
    client = connect(serving(tokenizer).target)
    items = [torch.from_numpy(latents(n + 1, 6, 4, seed=n)) for n in range(8)]
    options = {"layout": "channels_first", "num_quantizers": 2}
    found = list(client.encode_many(items, **options))
    for item, indices in zip(items, found, strict=True):
        assert indices.dtype == torch.int64
        assert torch.equal(indices, tokenizer.encode(item, **options))
    for indices, decoded in zip(found, client.decode_many(found, **options), strict=True):
        assert torch.equal(decoded, tokenizer.decode(indices, **options))


def test_requests_of_several_counts_at_once(serving, connect, latents, tokenizer):
    client = connect(serving(tokenizer).target)
    array = latents(50, 6)
    every = tokenizer.encode(array)
    for count in range(1, STAGES + 1):
        np.testing.assert_array_equal(client.encode(array, num_quantizers=count), every[:, :count])


@pytest.mark.parametrize("call", ["local", "remote"])
def test_rejected(serving, connect, latents, tokenizer, call):
    client = connect(serving(tokenizer).target) if call == "remote" else tokenizer
    array = latents(4, 6)
    indices = tokenizer.encode(array)
    for count in (0, -1, STAGES + 1, 1.0, True, "2"):
        with pytest.raises((InvalidArgument, InvalidOption), match="num_quantizers must be an integer"):
            client.encode(array, num_quantizers=count)
        with pytest.raises((InvalidArgument, InvalidOption), match="num_quantizers must be an integer"):
            client.decode(indices, num_quantizers=count)
    with pytest.raises((InvalidArgument, InvalidShape), match=r"have 2 for a token .*: pass num_quantizers"):
        client.decode(indices[:, :2])
    with pytest.raises((InvalidArgument, InvalidShape), match=r"have 2 for a token .*, expected 3 to 5"):
        client.decode(indices[:, :2], num_quantizers=3)
    with pytest.raises((InvalidArgument, InvalidShape), match="have 6 for a token"):
        client.decode(np.zeros((4, 6), np.uint16))
    with pytest.raises((InvalidArgument, InvalidShape), match="2 to 5 axes, not 1"):
        client.decode(indices[:, 0])
    with pytest.raises((InvalidArgument, InvalidOption), match="has stages"):
        client.decode(indices, output="code_rows")
    wrong = indices.copy()
    wrong[3, 1] = 300
    with pytest.raises((InvalidArgument, ValueError), match=r"indices\[3, 1\] is 300"):
        client.decode(wrong)
    # What is not used is not looked at.
    np.testing.assert_array_equal(client.decode(wrong, num_quantizers=1), tokenizer.decode(indices, num_quantizers=1))


def test_overflow_names_the_token(serving, connect, tokenizer):
    quantizer = ResidualQuantizer(2, 4, 3)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.zero_()
        quantizer.parts[0].stages[1].embedding.weight[2] = 1e6
    tokenizer = Tokenizer(quantizer, name="large", device="cpu")
    client = connect(serving(tokenizer).target)
    indices = np.zeros((2, 2, 5), np.uint8)
    indices[1, 1, 4] = 2
    for one in (client, tokenizer):
        with pytest.raises(ValueError, match=r"token \[1, 4\] decodes to a value beyond"):
            one.decode(indices, layout="channels_first", dtype="float16")


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_files(serving, latents, tokenizer, tmp_path, monkeypatch, layout):
    monkeypatch.setattr("vqserve_client.transfer._PIECE_BYTES", 256)
    target = serving(tokenizer).target
    source, middle, out = (tmp_path / f"{name}.npy" for name in ("in", "middle", "out"))
    array = latents(3, 6, 20, 6)
    np.save(source, array)
    options = ["--target", target, "--layout", layout, "--num-quantizers", "2"]
    assert main(["encode", str(source), "-o", str(middle), *options]) == 0
    indices = np.load(middle)
    np.testing.assert_array_equal(indices, tokenizer.encode(array, layout=layout, num_quantizers=2))
    assert main(["decode", str(middle), "-o", str(out), *options]) == 0
    np.testing.assert_array_equal(np.load(out), tokenizer.decode(indices, layout=layout, num_quantizers=2))


def test_more_stages_than_there_are(serving, latents, tokenizer, tmp_path, capsys):
    np.save(tmp_path / "in.npy", latents(3, 6))
    arguments = ["encode", str(tmp_path / "in.npy"), "-o", str(tmp_path / "out.npy"), "--num-quantizers", "6"]
    assert main([*arguments, "--target", serving(tokenizer).target]) == 1
    assert "--num-quantizers must be an integer in [1, 5], not 6" in capsys.readouterr().err


def test_a_codebook_without_stages(serving, connect, latents):
    plain = Tokenizer(VectorQuantizer(300, CHANNELS), name="plain", device="cpu")
    for one in (connect(serving(plain).target), plain):
        with pytest.raises(ValueError, match="num_quantizers must be 1, not 2: a token of this codebook has one index"):
            one.encode(latents(3, 6), num_quantizers=2)
        assert one.encode(latents(3, 6), num_quantizers=1).shape == (3,)


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_bench(serving, tokenizer, method, capsys):
    target = serving(tokenizer).target
    arguments = [
        "bench",
        "--method",
        method,
        "--grid",
        "2x3",
        "--warmup",
        "0.1",
        "--window",
        "0.1",
        "--max-windows",
        "1",
    ]
    assert main([*arguments, "--target", target, "--layout", "channels_first"]) == 0
    assert "requests/s" in capsys.readouterr().out
