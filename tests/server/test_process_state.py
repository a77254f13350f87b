"""What a process, or a thread, may have set around us changes no codebook, no digest and no token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kinds import CASES, make
from support.process_state import STATES
from vqserve_server import Tokenizer
from vqserve_server.codebooks import codebook_digest, load_codebook, save_codebook


def answers(tokenizer: Tokenizer, latents: np.ndarray) -> tuple[object, ...]:
    indices = tokenizer.encode(latents)
    info = tokenizer.info
    tokens = np.arange(min(info.stage_vocab_sizes, default=tokenizer.decodable))
    decoded = tokenizer.decode(np.repeat(tokens[:, None], info.num_quantizers, axis=1) if info.has_stages else tokens)
    return (info, tokenizer.weight_dtype, indices.dtype, indices.tobytes(), decoded.dtype, decoded.tobytes())


def hard_latents(channels: int) -> np.ndarray:
    """Return latents (n, channels) with ties, zeros, and numbers near float32's ends."""
    # Long enough for the searches to use threads and matrix products.
    latents = np.random.default_rng(0).normal(size=(320, channels)).astype(np.float32)
    latents[::8] = np.round(latents[::8])
    latents[1::8] = 0
    latents[2::16] *= np.float32(1e-42)
    latents[3::16] *= np.float32(1e15)
    return latents


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("state", STATES)
def test_loaded_and_served(tmp_path, state, kind):
    quantizer = make(kind)
    path = tmp_path / "one.safetensors"
    digest = save_codebook(quantizer, path)
    latents = hard_latents(quantizer.input_dim)
    usual = Tokenizer.load(path)
    expected = answers(usual, latents)
    with STATES[state]():
        codebook = load_codebook(path)
        inside = Tokenizer.load(path)
        assert answers(inside, latents) == expected
        assert answers(usual, latents) == expected
        assert codebook_digest(codebook.quantizer) == digest
        assert save_codebook(codebook.quantizer, tmp_path / "again.safetensors") == digest
    assert answers(inside, latents) == expected
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    loaded = codebook.quantizer.state_dict()
    for name, tensor in quantizer.state_dict().items():
        assert (loaded[name].dtype, loaded[name].device) == (tensor.dtype, tensor.device)
        assert torch.equal(loaded[name], tensor)
    # As any module that was loaded: it can be trained and changed.
    assert not any(tensor.is_inference() for tensor in codebook.quantizer.state_dict().values())
