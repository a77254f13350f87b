"""Tokenizers go to other processes with their codebook, as clients do with their options."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from kinds import with_every_kind
from vqserve_server.errors import Closed
from vqserve_server.quantizers import (
    EMAVectorQuantizer,
    GumbelQuantizer,
    VectorQuantizer,
    VectorQuantizerWithInputProjection,
)
from vqserve_server.search import available
from vqserve_server.tokenizer import Tokenizer

QUANTIZERS = with_every_kind(
    {
        "vq": lambda: VectorQuantizer(40, 6),
        "vq with a remap": lambda: VectorQuantizer(40, 6, remap=[4, 9, 30], unknown_index="extra"),
        "weight norm": lambda: VectorQuantizer(40, 6, embedding_weight_norm=True),
        "float64": lambda: VectorQuantizer(40, 6).double(),
        "ema": lambda: EMAVectorQuantizer(40, 6, 0.25),
        "gumbel": lambda: GumbelQuantizer(6, 3, 40, remap=[7, 1, 8]),
        "projection": lambda: VectorQuantizerWithInputProjection(6, 40, 3, output_dim=5),
    }
)
GOLDEN = Path(__file__).parents[1] / "golden"
LATENTS = np.random.default_rng(0).standard_normal((2, 6, 9, 9)).astype(np.float32) / 40


def tokenizer_of(quantizer, **options):
    return Tokenizer(quantizer, name="book", device="cpu", **options)


def again(tokenizer):
    return pickle.loads(pickle.dumps(tokenizer))  # noqa: S301


@pytest.mark.parametrize("clone", [again, copy.copy, copy.deepcopy])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_clone_is_equal(name, clone):
    torch.manual_seed(0)
    tokenizer = tokenizer_of(QUANTIZERS[name]())
    other = clone(tokenizer)
    assert repr(other) == repr(tokenizer)
    for attribute in ("info", "decodable", "device", "search", "weight_dtype"):
        assert getattr(other, attribute) == getattr(tokenizer, attribute)
    latents = LATENTS.repeat(2, axis=1)[:, : tokenizer.info.input_dim]
    indices = tokenizer.encode(latents)
    assert (other.encode(latents) == indices).all()
    for output in ("latents",) if tokenizer.info.has_stages else ("latents", "code_rows"):
        assert (other.decode(indices, output=output) == tokenizer.decode(indices, output=output)).all()
    other.close()
    assert (tokenizer.encode(latents) == indices).all()


@pytest.mark.parametrize("search", available("cpu"))
def test_a_clone_keeps_the_search_backend(search):
    assert again(tokenizer_of(VectorQuantizer(40, 6), search=search)).search == search


def test_equal_codes_stay_equal():
    quantizer = VectorQuantizer(40, 6)
    with torch.no_grad():
        quantizer.embedding.weight[20:] = quantizer.embedding.weight[:20]
    indices = again(tokenizer_of(quantizer)).encode(LATENTS)
    assert indices.max() < 20
    assert (indices == tokenizer_of(quantizer).encode(LATENTS)).all()


def test_a_spawned_process():
    tokenizer = tokenizer_of(VectorQuantizer(40, 6))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert (pool.submit(tokenizer.encode, LATENTS).result() == tokenizer.encode(LATENTS)).all()


def test_a_closed_one_stays_closed():
    tokenizer = tokenizer_of(VectorQuantizer(40, 6))
    tokenizer.close()
    with pytest.raises(Closed):
        again(tokenizer).encode(LATENTS)


def test_tokenizers_that_an_earlier_release_pickled():
    stored = np.load(GOLDEN / "tokenizer_pickles.npz")
    names = {name.removesuffix("/pickle") for name in stored.files if name.endswith("/pickle")}
    kinds = set()
    for name in names:
        tokenizer = pickle.loads(stored[f"{name}/pickle"].tobytes())  # noqa: S301
        kinds.add(tokenizer.info.kind)
        latents = np.random.default_rng(1).standard_normal((20, tokenizer.info.input_dim)).astype(np.float32)
        indices = tokenizer.encode(latents)
        np.testing.assert_array_equal(indices, stored[f"{name}/indices"])
        np.testing.assert_array_equal(tokenizer.decode(indices), stored[f"{name}/latents"])
    assert kinds == {"vq", "ema", "gumbel", "vq_projection", "cosine", "dot", "rvq", "fsq", "lfq"}
