"""A tokenizer and a server on a GPU: the tokens and latents that the CPU gives, through the real client."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from vqserve_client import Client
from vqserve_server import Tokenizer
from vqserve_server.quantizers import GumbelQuantizer, VectorQuantizer, VectorQuantizerWithInputProjection

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]


@pytest.fixture(params=["vq", "gumbel", "vq_projection"])
def quantizer(request):
    torch.manual_seed(0)
    if request.param == "vq":
        return VectorQuantizer(16384, 4)
    if request.param == "gumbel":
        return GumbelQuantizer(12, 6, 512)
    return VectorQuantizerWithInputProjection(12, 512, 6, output_dim=5)


def test_a_tokenizer_gives_the_cpu_s_answers(quantizer):
    on_cpu, on_gpu = (Tokenizer(quantizer, name="book", device=device) for device in ("cpu", "cuda"))
    assert on_gpu.device.type == "cuda"
    assert on_gpu.digest == on_cpu.digest
    latents = torch.randn(3, on_cpu.info.input_dim, 16, 16)
    indices = on_cpu.encode(latents)
    assert torch.equal(on_gpu.encode(latents).cpu(), indices)
    assert torch.equal(on_gpu.encode(latents.cuda()).cpu(), indices)
    assert torch.equal(on_gpu.decode(indices).cpu(), on_cpu.decode(indices))


def test_tensors_come_back_to_their_device(quantizer, serving):
    on_cpu = Tokenizer(quantizer, name="book", device="cpu")
    tensor = torch.randn(2, on_cpu.info.input_dim, 3, 5, device="cuda", requires_grad=True)
    expected = on_cpu.encode(tensor.cpu())
    with Client(serving(on_cpu).target) as client:
        for book in (client, on_cpu, Tokenizer(quantizer, device="cuda")):
            indices = book.encode(tensor)
            assert indices.device == tensor.device
            assert torch.equal(indices.cpu(), expected)
            decoded = book.decode(indices, dtype="bfloat16")
            assert decoded.device == tensor.device
            assert torch.equal(decoded.cpu(), on_cpu.decode(expected, dtype="bfloat16"))


def test_a_server_answers_many_clients_as_the_cpu_would(quantizer, serving):
    on_cpu = Tokenizer(quantizer, name="book", device="cpu")
    server = serving(Tokenizer(quantizer, name="book", device="cuda"))
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, on_cpu.info.input_dim, 8, n), dtype=np.float32) for n in range(1, 33)]
    with Client(server.target) as client, ThreadPoolExecutor(16) as pool:
        for latents, indices in zip(arrays, pool.map(client.encode, arrays), strict=True):
            assert np.array_equal(indices, on_cpu.encode(latents))
            assert np.array_equal(client.decode(indices), on_cpu.decode(indices))
