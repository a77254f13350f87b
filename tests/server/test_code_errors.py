"""The error of rows against the codes that were chosen, for every kind, against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kinds import CASES, make
from vqserve_server.quantizers import VectorQuantizer
from vqserve_server.tokenizer import Tokenizer


def encoded(quantizer, rows=50, dtype=np.float32):
    tokenizer = Tokenizer(quantizer)
    latents = np.random.default_rng(1).standard_normal((rows, quantizer.input_dim)).astype(dtype)
    return tokenizer, latents, tokenizer.encode_rows(latents).reshape(rows, -1)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_kind(name, dtype):
    quantizer = make(name)
    tokenizer, latents, indices = encoded(quantizer, dtype=dtype)
    if not quantizer.is_approximate:
        assert tokenizer.errors is None
        return
    known = (indices < tokenizer.decodable).all(axis=1)
    asked = indices[known] if tokenizer.info.has_stages else indices[known, 0]
    space = tokenizer.errors.space
    if space == "latents":
        wanted, found = latents[known].astype(np.float64), tokenizer.decode_rows(asked)
    else:
        # Projected by torch in float64, not exactly rounded.
        projection = quantizer.input_projection()
        wanted = latents[known].astype(np.float64)
        if projection is not None:
            weight, bias = (part.double().numpy() for part in projection)
            wanted = wanted @ weight.T + bias
        found = tokenizer.decode_rows(asked, output="code_rows")
        if space == "directions":
            wanted, found = unit(wanted), unit(found.astype(np.float64))
        elif space == "bounded latents":
            wanted = quantizer.bounded(torch.from_numpy(wanted)).numpy()
    expected = np.square(found.astype(np.float64) - wanted).mean(axis=1)
    errors = tokenizer.errors.of(latents, indices)
    assert errors.shape == (50,)
    assert errors[known] == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert np.isnan(errors[~known]).all()


def test_a_sentinel_has_no_error():
    torch.manual_seed(0)
    tokenizer, latents, indices = encoded(VectorQuantizer(12, 3, remap=[7], unknown_index=300))
    assert set(indices.ravel()) == {0, 300}
    errors = tokenizer.errors.of(latents, indices)
    assert np.array_equal(np.isnan(errors), indices[:, 0] == 300)


def test_later_changes_of_the_quantizer_have_no_effect():
    quantizer = make("cosine_all")
    tokenizer, latents, indices = encoded(quantizer)
    before = tokenizer.errors.of(latents, indices)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.mul_(3)
    assert np.array_equal(tokenizer.errors.of(latents, indices), before)
