"""Residual codebooks behind a server: a token's indices are an axis, in the place of the channels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from vqserve_client import IndexOutOfRange, InvalidArgument, ProtocolError
from vqserve_client.cli import main
from vqserve_server.errors import InvalidOption, InvalidShape
from vqserve_server.quantizers import ResidualQuantizer, VectorQuantizer
from vqserve_server.tokenizer import Tokenizer

STAGES, CHANNELS = 5, 6


def make(num_quantizers=STAGES, layout=None, n_e=300):
    torch.manual_seed(1)
    quantizer = ResidualQuantizer(num_quantizers, n_e, CHANNELS)
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
    monkeypatch.setattr("vqserve_client.conversion.PIECE_BYTES", 256)
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


# Stages of different sizes.

SIZES = (300, 5, 7, 300, 2)


@pytest.fixture
def uneven():
    return make(n_e=SIZES)


@pytest.mark.parametrize("layout", ["channels_first", "channels_last", None])
@pytest.mark.parametrize("shape", [(9, 6), (2, 6, 6), (2, 6, 3, 6), (1, 6, 2, 3, 6)])
@pytest.mark.parametrize("count", [1, 3, None])
def test_remote_is_local_for_stages_of_different_sizes(serving, connect, latents, uneven, layout, shape, count):
    client = connect(serving(uneven).target)
    [info] = client.codebooks()
    assert info == uneven.info
    assert (info.stage_vocab_sizes, info.vocab_size, info.num_codes) == (SIZES, 300, 300)
    array = latents(*shape)
    layout = layout if len(shape) > 2 else None
    indices = client.encode(array, layout=layout, num_quantizers=count)
    assert indices.dtype == np.uint16
    np.testing.assert_array_equal(indices, uneven.encode(array, layout=layout, num_quantizers=count))
    every = uneven.encode(array, layout=layout)
    expected = uneven.decode(every, layout=layout, num_quantizers=count)
    for given in (indices, every, torch.from_numpy(every.astype(np.int64))):
        np.testing.assert_array_equal(client.decode(given, layout=layout, num_quantizers=count), expected)


def test_the_info_of_equal_stages_is_as_ever(tokenizer):
    assert tokenizer.info.stage_vocab_sizes == ()


@pytest.mark.parametrize("call", ["local", "remote"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_an_index_beyond_its_stage_is_named(serving, connect, uneven, call, kind):
    client = connect(serving(uneven).target) if call == "remote" else uneven

    def decode(indices, **options):
        return client.decode(torch.from_numpy(indices) if kind == "torch" else indices, **options)

    most = np.tile(np.array(SIZES) - 1, (4, 1))
    decode(most)
    for stage, size in enumerate(SIZES):
        wrong = most.copy()
        # Most of these are fine in stage 0.
        wrong[2, stage] = size
        match = rf"indices\[2, {stage}\] is {size}, not in \[0, {size}\), the vocabulary of stage {stage} "
        with pytest.raises(IndexOutOfRange, match=match) as caught:
            decode(wrong)
        assert caught.value.position == (2, stage)
        if stage:
            # What is not used is not looked at.
            decode(wrong, num_quantizers=stage)
    first = np.zeros((2, len(SIZES), 3), np.int64)
    first[1, 1, 2] = 5
    with pytest.raises(IndexOutOfRange, match=r"indices\[1, 1, 2\] is 5, not in \[0, 5\), the vocabulary of stage 1 "):
        decode(first, layout="channels_first")
    with pytest.raises(IndexOutOfRange, match=r"indices\[3, 4\] is -1, not in \[0, 2\), the vocabulary of stage 4 "):
        decode(np.where(np.arange(20).reshape(4, 5) == 19, -1, most))


def test_positions_count_in_the_caller_s_array(serving, connect, uneven):
    wrong = np.zeros((3, 5, 40, 6), np.int64)
    wrong[2, 1, 33, 4] = 299
    client = connect(serving(uneven).target, max_message_bytes=1500)
    with pytest.raises(
        IndexOutOfRange, match=r"indices\[2, 1, 33, 4\] is 299, not in \[0, 5\), the vocabulary of stage 1"
    ):
        client.decode(wrong, layout="channels_first")
    client = connect(serving(uneven).target)
    items = [np.zeros((1, 5, 4), np.int64) for _ in range(6)]
    items[4][0, 4, 3] = 2
    with pytest.raises(
        IndexOutOfRange, match=r"indices\[0, 4, 3\] is 2, not in \[0, 2\), the vocabulary of stage 4"
    ) as caught:
        list(client.decode_many(items, layout="channels_first"))
    assert caught.value.item == 4


def test_a_reply_with_an_index_beyond_its_stage_is_refused(serving, connect, latents, tokenizer):
    tokenizer.info = replace(tokenizer.info, stage_vocab_sizes=(300, 5, 300, 300, 300))
    with pytest.raises(ProtocolError, match="beyond its stage in vocabularies of 1 stage of 300, 1 of 5 and 3 of 300"):
        connect(serving(tokenizer).target).encode(latents(40, 6))


def test_the_list_tells_the_sizes(serving, uneven, capsys):
    assert main(["codebooks", "--target", serving(uneven).target]) == 0
    assert "5 stages of 2 to 300" in capsys.readouterr().out


@pytest.mark.parametrize("sizes", [300, SIZES])
@pytest.mark.parametrize("method", ["encode", "decode"])
def test_bench(serving, sizes, method, capsys):
    target = serving(make(n_e=sizes)).target
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
