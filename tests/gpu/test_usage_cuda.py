"""Errors and counts of sampled rows on a GPU: those of the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kinds import CASES, make
from vqserve_server.tokenizer import Tokenizer
from vqserve_server.usage.health import HealthReader
from vqserve_server.usage.live import LiveUsage

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]


@pytest.mark.parametrize("name", CASES)
def test_figures_are_those_of_the_cpu(name: str) -> None:
    found = []
    for device in ("cpu", "cuda"):
        tokenizer = Tokenizer(make(name), device=device)
        latents = np.random.default_rng(0).standard_normal((2000, tokenizer.info.input_dim)).astype(np.float32)
        memory = memoryview(bytearray(1 << 20))
        usage = LiveUsage(memory, one_in=1)
        usage.follow([tokenizer])
        usage.record(tokenizer, latents, tokenizer.encode_rows(latents), range(2000))
        found.append(HealthReader([memory]).as_json()[0])
    cpu, cuda = found
    assert cuda["stages"] == cpu["stages"]
    assert cuda["error"] == (None if cpu["error"] is None else pytest.approx(cpu["error"], rel=1e-9))
