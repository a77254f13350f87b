"""The device threads on a GPU: each with a stream of its own, and none reads what another has not finished."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from support.engine_jobs import Jobs
from vqserve_client import Client
from vqserve_server import Tokenizer
from vqserve_server.device import DeviceStreams
from vqserve_server.engine import DecodeKey, EncodeKey, Engine
from vqserve_server.engine.batch import Staging
from vqserve_server.quantizers import VectorQuantizer

JOBS = Jobs()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]


def quantizer(seed: int = 0) -> VectorQuantizer:
    """Codes of length 1."""
    made = VectorQuantizer(16384, 4)
    codes = torch.randn(16384, 4, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        made.embedding.weight.copy_(torch.nn.functional.normalize(codes, dim=1))
    return made


def latents(book: Tokenizer, rng: np.random.Generator) -> np.ndarray:
    """Some at random, and zeros, to which all codes of one length are near: the searchers made on demand get them."""
    drawn = rng.standard_normal((int(rng.integers(1, 9)), book.info.input_dim, 16, 16), dtype=np.float32)
    drawn[0, :, :8] = 0.0
    return drawn


def test_staging_is_page_locked_and_each_thread_has_a_stream() -> None:
    book = Tokenizer(quantizer(), device="cuda")
    one, other, staging = DeviceStreams(), DeviceStreams(), Staging()
    for key in (EncodeKey(book, np.dtype(np.float32)), DecodeKey(book, "latents", np.dtype(np.float32))):
        assert torch.from_numpy(staging.rows(key, 100)).is_pinned()
    streams = []
    for thread in (one, one, other):
        with thread.on(book.device):
            streams.append(torch.cuda.current_stream())
    assert streams[0] == streams[1] != streams[2]
    assert torch.cuda.default_stream() not in streams


@pytest.mark.parametrize("search", ["auto", "torch", "reference"])
def test_what_is_made_on_demand_is_there_for_both_threads(serving, search: str) -> None:
    # A fresh server each time: the first requests, all at once, are the ones that make what is missing.
    rng = np.random.default_rng(1)
    for seed in range(5):
        on_cpu = Tokenizer(quantizer(seed=seed), name="book", device="cpu")
        arrays = [latents(on_cpu, rng) for _ in range(64)]
        expected = [on_cpu.encode(array) for array in arrays]
        server = serving(
            Tokenizer(quantizer(seed=seed), name="book", device="cuda", search=search), max_batch_rows=1000
        )
        with Client(server.target) as client, ThreadPoolExecutor(32) as pool:
            for found, right in zip(pool.map(client.encode, arrays), expected, strict=True):
                np.testing.assert_array_equal(found, right)
            for dtype in ("float16", "bfloat16", "float32"):
                decoded = pool.map(lambda indices, dtype=dtype: client.decode(indices, dtype=dtype), expected)
                for found, indices in zip(decoded, expected, strict=True):
                    np.testing.assert_array_equal(found, on_cpu.decode(indices, dtype=dtype))


def test_codebooks_that_come_under_load_are_there_before_they_are_searched() -> None:
    engine = Engine([Tokenizer(quantizer(), name="book", device="cuda")])
    engine.start()
    rows = np.random.default_rng(2).standard_normal((3000, 4), dtype=np.float32)
    try:
        for seed in range(20):
            on_cpu = Tokenizer(quantizer(seed=seed), name="book", device="cpu")
            fresh = Tokenizer(quantizer(seed=seed), name="book", device="cuda")
            engine.swap([fresh])
            # One after the other: each of the two threads may get some.
            jobs = [JOBS.encode(fresh, rows) for _ in range(4)]
            for job in jobs:
                engine.scheduler.put(job)
            for job in jobs:
                np.testing.assert_array_equal(JOBS.array(job), on_cpu.encode_rows(rows))
    finally:
        assert engine.stop()
