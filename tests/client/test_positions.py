"""Errors name positions in the caller's whole array or file, however it was cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vqserve_client import InvalidArgument
from vqserve_client.arrays import of_whole
from vqserve_client.cli import main
from vqserve_server.quantizers import ResidualQuantizer, VectorQuantizer
from vqserve_server.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def books():
    torch.manual_seed(0)
    residual = ResidualQuantizer(3, 300, 4)
    return {
        "plain": Tokenizer(VectorQuantizer(300, 4), name="plain", device="cpu"),
        "residual": Tokenizer(residual, name="residual", device="cpu"),
    }


# Of latents that are cut inside their items, and of whole items.
LATENTS = [
    ((5, 4, 9, 9), "channels_first", (3, 1, 7, 2)),
    ((40, 4, 2, 3), "channels_first", (33, 3, 1, 0)),
    ((5, 9, 9, 4), "channels_last", (4, 8, 8, 3)),
    ((500, 4), None, (499, 0)),
]


@pytest.mark.parametrize(("shape", "layout", "position"), LATENTS)
def test_encode(serving, books, connect, latents, shape, layout, position):
    array = latents(*shape)
    array[position] = np.nan
    client = connect(serving(books["plain"]).target, max_message_bytes=1024)
    with pytest.raises(InvalidArgument) as caught:
        client.encode(array, layout=layout)
    assert caught.value.message == f"latents{list(position)} is nan"


@pytest.mark.parametrize(("shape", "layout", "position"), LATENTS)
def test_encode_a_file(serving, books, latents, tmp_path, monkeypatch, capsys, shape, layout, position):
    monkeypatch.setattr("vqserve_client.conversion.PIECE_BYTES", 2000)
    array = latents(*shape)
    array[position] = np.nan
    source, out = tmp_path / "latents.npy", tmp_path / "tokens.npy"
    np.save(source, array)
    target = serving(books["plain"]).target
    options = ["--max-message-bytes", "1500", *(["--layout", layout] if layout else [])]
    assert main(["encode", str(source), "-o", str(out), "--target", target, *options]) == 1
    assert f"error: {source}: latents{list(position)} is nan (server" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "shape", "position"),
    [("plain", (5, 9, 9), (3, 7, 2)), ("plain", (500,), (400,)), ("residual", (9, 3, 30), (7, 2, 29))],
)
def test_decode_and_decode_a_file(serving, books, connect, tmp_path, monkeypatch, capsys, name, shape, position):
    monkeypatch.setattr("vqserve_client.conversion.PIECE_BYTES", 1000)
    indices = np.zeros(shape, np.int64)
    indices[position] = 300
    target = serving(books[name]).target
    options = {"layout": "channels_first"} if name == "residual" else {}
    wrong = f"indices{list(position)} is 300, not in [0, 300)"
    with pytest.raises(InvalidArgument) as caught:
        connect(target, max_message_bytes=1024).decode(indices, **options)
    assert caught.value.message == wrong
    source, out = tmp_path / "indices.npy", tmp_path / "latents.npy"
    np.save(source, indices)
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    assert main(["decode", str(source), "-o", str(out), "--target", target, *words]) == 1
    assert f"error: {source}: {wrong}" in capsys.readouterr().err


def test_the_shape_of_a_file_is_the_file_s(serving, books, latents, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vqserve_client.conversion.PIECE_BYTES", 1000)
    target = serving(books["residual"]).target
    source = tmp_path / "in.npy"
    for command, array, text in (
        ("encode", latents(90, 5, 9, 9), "latents of shape (90, 5, 9, 9) have 5 channels"),
        ("encode", np.arange(4), "latents must be float16, bfloat16, float32 or float64, not int64: are they indices?"),
        ("decode", np.zeros((90, 7), np.uint16), "indices of shape (90, 7) have 7 for a token"),
        ("decode", np.zeros((3, 90, 7), np.uint16), "are they (n_q, b, ...)? swapaxes(0, 1) first"),
        ("decode", np.zeros((1,) * 7, np.uint16), "indices must have 2 to 5 axes, not 7"),
        ("decode", latents(3, 3), "indices must be integers, not float32: are they latents? use encode"),
    ):
        np.save(source, array)
        options = ["--layout", "channels_first"] if array.ndim == 3 else []
        assert main([command, str(source), "-o", str(tmp_path / "out.npy"), "--target", target, *options]) == 1
        err = capsys.readouterr().err
        assert err.startswith(f"vqserve: error: {source}: ")
        assert text in err


@pytest.mark.parametrize(
    ("array", "position", "whole"),
    [
        ("latents", (0, 1, 2), "latents[3, 1, 12]"),
        ("tokens", (0, 2), "token [3, 12]"),
        ("indices", (0, 1, 2), "indices[3, 1, 12]"),
        ("latents", (0, 1), "latents[0, 1]"),
        ("latents", None, "latents"),
    ],
)
def test_positions_of_parts(array, position, whole):
    cut = (slice(3, 4), slice(None), slice(10, 20))
    error = InvalidArgument("{where} is wrong [0, 1, 2]", array=array, position=position)
    assert of_whole(error, array=cut, grid=(cut[0], cut[2])).message == f"{whole} is wrong [0, 1, 2]"


def test_the_array_of_many_that_failed(serving, books, connect, latents):
    client = connect(serving(books["plain"]).target)
    good, bad = latents(2, 4), latents(2, 4)
    bad[1, 2] = np.inf
    answers = client.encode_many([good, good, bad])
    assert len([next(answers), next(answers)]) == 2
    with pytest.raises(InvalidArgument, match=r"latents\[1, 2\] is inf \(array 2, counting from 0, server ") as caught:
        next(answers)
    assert caught.value.item == 2
    with pytest.raises(TypeError, match=r"not list: convert it with numpy.asarray \(array 1, counting from 0\)"):
        list(client.encode_many([good, [1.0]]))
    with pytest.raises(InvalidArgument, match="array 0, counting from 0"):
        list(client.decode_many([good]))


def test_one_array_is_not_many(serving, books, connect, latents):
    client = connect(serving(books["plain"]).target)
    array = latents(2, 4)
    for one in (client, books["plain"]):
        for given in (array, torch.from_numpy(array), np.zeros((), np.float32)):
            with pytest.raises(TypeError, match=r"iterable of arrays, not one: encode\(x\), or encode_many\(\[x\]\)"):
                next(one.encode_many(given))
            with pytest.raises(TypeError, match=r"or decode_many\(\[x\]\)"):
                next(one.decode_many(given))
