"""`batched=False`: arrays without a batch axis, their results, and errors about the caller's own shape."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from vqserve_client import InvalidArgument
from vqserve_server import Tokenizer
from vqserve_server.quantizers import ResidualQuantizer, VectorQuantizer


@pytest.fixture(scope="module")
def tokenizers():
    torch.manual_seed(0)
    residual = ResidualQuantizer(3, 300, 4)
    return {
        "plain": Tokenizer(VectorQuantizer(300, 4), name="plain", device="cpu"),
        "residual": Tokenizer(residual, name="residual", device="cpu"),
    }


@pytest.fixture
def book(request, tokenizers, serving, connect):
    where, name = request.param
    return tokenizers[name] if where == "local" else connect(serving(tokenizers[name]).target)


def everywhere(*names):
    ways = [("sync", "local"), ("sync", "remote"), ("async", "remote")]
    cases = [(kind, (where, name)) for kind, where in ways for name in names]
    return pytest.mark.parametrize(("connect", "book"), cases, indirect=True)


SHAPES = [
    ((4, 9, 5), None),
    ((4, 2, 9, 5), None),
    ((9, 4), "channels_last"),
    ((4,), None),
    ((9, 5, 4), "channels_last"),
]
SHAPES += [((4, 9), "channels_first"), ((0, 4), "channels_last"), ((4, 0, 5), None)]


@everywhere("plain", "residual")
@pytest.mark.parametrize(("shape", "layout"), SHAPES)
@pytest.mark.parametrize("as_torch", [False, True])
def test_results_are_those_with_a_batch_axis(book, latents, shape, layout, as_torch):
    array = torch.from_numpy(latents(*shape)) if as_torch else latents(*shape)
    expected = book.encode(array[None], layout=layout)
    indices = book.encode(array, layout=layout, batched=False)
    assert type(indices) is type(array)
    assert (indices.shape, indices.dtype) == (expected.shape[1:], expected.dtype)
    assert (indices == expected[0]).all()
    (many,) = book.encode_many([array], layout=layout, batched=False)
    assert (many.shape, bool((many == indices).all())) == (indices.shape, True)
    wanted = book.decode(expected, layout=layout)
    decoded = book.decode(indices, layout=layout, batched=False)
    assert type(decoded) is type(array)
    assert (decoded.shape, decoded.dtype) == (shape, wanted.dtype)
    assert (decoded == wanted[0]).all()
    (many,) = book.decode_many([indices], layout=layout, batched=False)
    assert (many == decoded).all()


def test_small_arrays_are_sent_together(streaming, connect, latents):
    client = connect(streaming.target)
    arrays = [latents(4, 3, 3, seed=number) for number in range(100)]
    results = list(client.encode_many(arrays, batched=False))
    assert len(streaming.requests) < 50
    for array, indices in zip(arrays, results, strict=True):
        assert indices.shape == (3, 3)
        assert (indices == client.encode(array[None])[0]).all()


def test_arrays_that_are_cut(tokenizers, serving, connect, latents):
    client = connect(serving(tokenizers["plain"]).target, max_message_bytes=1024)
    array = latents(4, 40, 40)
    assert (client.encode(array, batched=False) == tokenizers["plain"].encode(array[None])[0]).all()
    array[2, 33, 7] = np.nan
    with pytest.raises(InvalidArgument) as caught:
        client.encode(array, batched=False)
    assert (caught.value.message, caught.value.position) == ("latents[2, 33, 7] is nan", (2, 33, 7))


@everywhere("plain")
@pytest.mark.parametrize(
    ("method", "array", "options", "text"),
    [
        ("encode", np.full((4, 3, 3), np.nan, np.float32), {}, "latents[0, 0, 0] is nan"),
        ("encode", np.full(4, np.inf, np.float32), {}, "latents[0] is inf"),
        ("encode", np.zeros((), np.float32), {}, "latents without a batch axis must have 1 to 4 axes, not 0"),
        (
            "encode",
            np.zeros((1, 1, 1, 1, 4), np.float32),
            {},
            "latents without a batch axis must have 1 to 4 axes, not 5",
        ),
        (
            "encode",
            np.zeros((5, 3, 3), np.float32),
            {},
            "latents of shape (5, 3, 3) have 5 channels in layout channels_first, the codebook takes 4",
        ),
        (
            "encode",
            np.zeros((2, 4, 3, 3), np.float32),
            {},
            "latents of shape (2, 4, 3, 3) have 2 channels in layout channels_first, the codebook takes 4: "
            "is there a batch axis? pass batched=True",
        ),
        (
            "encode",
            np.zeros((3, 3, 4), np.float32),
            {},
            "latents of shape (3, 3, 4) have 3 channels in layout channels_first, the codebook takes 4: "
            'should it be layout="channels_last"?',
        ),
        (
            "encode",
            np.zeros(4, np.float32),
            {"layout": "channels_first"},
            "latents of 1 axis are (C,): channels_first needs at least 2 axes",
        ),
        ("decode", np.array(300), {}, "indices is 300, not in [0, 300)"),
        ("decode", np.array([[0, 1], [2, 300]]), {}, "indices[1, 1] is 300, not in [0, 300)"),
        ("decode", np.array([0, 1 << 63], np.uint64), {}, f"indices[1] is {1 << 63}, not in [0, 300)"),
        ("decode", np.zeros((1, 1, 1, 1), np.int64), {}, "indices without a batch axis must have 0 to 3 axes, not 4"),
    ],
)
def test_errors_are_about_the_caller_s_array(book, method, array, options, text):
    with pytest.raises(InvalidArgument) as caught:
        getattr(book, method)(array, batched=False, **options)
    assert caught.value.message == text
    with pytest.raises(InvalidArgument) as caught:
        list(getattr(book, f"{method}_many")([array, array], batched=False, **options))
    assert (caught.value.message, caught.value.item) == (text, 0)


@everywhere("residual")
def test_errors_about_stages(book):
    with pytest.raises(
        InvalidArgument, match=r"^indices of shape \(2, 5\) have 2 for a token in layout channels_first"
    ):
        book.decode(np.zeros((2, 5), np.int64), batched=False)


@everywhere("plain")
def test_nothing_is_guessed(book, latents):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert book.encode(latents(4, 8, 4), batched=False).shape == (8, 4)
    with pytest.raises(TypeError, match="batched must be True or False, not 1"):
        book.encode(latents(4, 8, 4), batched=1)
