"""Batches that compiled code computes where the requests are: the same as row by row, to the bit, errors included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from support.engine_jobs import CALLER
from support.fenced import fenced
from vqserve import dtypes
from vqserve.errors import InvalidArgument
from vqserve.layout import Layout, grid_shape, latents_shape
from vqserve_server.engine import DecodeJob, DecodeKey, EncodeJob, EncodeKey, Job
from vqserve_server.engine.batch import Batch, Staging
from vqserve_server.engine.caller import CANARY
from vqserve_server.quantizers import DotQuantizer, VectorQuantizer
from vqserve_server.search import SearchCounts
from vqserve_server.search.native import levels
from vqserve_server.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(not levels(), reason="the compiled search was not built for this platform")

LATENTS = [dtype.storage for dtype in dtypes.LATENTS]
INDICES = [dtype.storage for dtype in dtypes.INDICES]
SHAPES = [(7, 1, 1), (1, 1, 1), (3, 5, 1), (2, 3, 4), (1, 9, 8), (2, 1, 33)]


class RowByRow:
    """A tokenizer that takes and gives rows only."""

    native_batch = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def vector(codes: int, dim: int, **options: Any) -> Tokenizer:
    quantizer = VectorQuantizer(codes, dim, **options)
    values = torch.randn(codes, dim, generator=torch.Generator().manual_seed(codes))
    quantizer.load_state_dict({**quantizer.state_dict(), "embedding.weight": values})
    return Tokenizer(quantizer, device="cpu")


def with_duplicates() -> Tokenizer:
    quantizer = VectorQuantizer(40, 5)
    values = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    quantizer.load_state_dict({"embedding.weight": torch.cat([values, values.flip(0)])})
    return Tokenizer(quantizer, device="cpu")


def dot() -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(DotQuantizer(70, 9), device="cpu")


BOOKS: dict[str, Callable[[], Tokenizer]] = {
    "few codes": lambda: vector(20, 3),
    "boxes": lambda: vector(300, 4),
    "wide": lambda: vector(90, 35),
    "duplicates": with_duplicates,
    "remap": lambda: vector(30, 4, remap=np.arange(3, 30, 3), unknown_index="extra"),
    "dot": dot,
}


@pytest.fixture(params=BOOKS)
def tokenizer(request: Any) -> Tokenizer:
    made = BOOKS[request.param]()
    assert made.native_batch is not None
    return made


def nothing() -> None:
    pass


class Drawn:
    """Random requests of one batch, in arrays of every form."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.tokenizer = tokenizer
        self.info = tokenizer.info
        self.requests = [self._shape() for _ in range(self.rng.integers(1, 6))]

    def _shape(self) -> tuple[tuple[int, ...], Layout]:
        grid = SHAPES[self.rng.integers(len(SHAPES))]
        layout = Layout.CHANNELS_FIRST if self.rng.integers(2) else Layout.CHANNELS_LAST
        return latents_shape(grid, self.info.input_dim, layout), layout

    def encode(self, *, wide: bool) -> tuple[list[np.ndarray], list[np.dtype]]:
        """The latents of each request, and the type of its indices."""
        types = [np.dtype("<f8")] if wide else [dtype for dtype in LATENTS if dtype.itemsize < 8]
        latents = []
        for shape, _ in self.requests:
            dtype = types[self.rng.integers(len(types))]
            values = self.rng.standard_normal(shape).astype("f4")
            latents.append(dtypes.LATENTS_BY_STORAGE[dtype].narrow(values))
        kinds = [dtype for dtype in INDICES if self.info.vocab_size <= np.iinfo(dtype).max + 1]
        return latents, [kinds[self.rng.integers(len(kinds))] for _ in latents]


def compute(tokenizer: Any, jobs: list[Job], key: Any, cuts: np.random.Generator) -> list[Batch]:
    """Compute jobs in some batches, each of which has an end of one job and a beginning of the next."""
    batches = [Batch(key)]
    for job in jobs:
        while job.next_row < job.rows:
            rows = int(cuts.integers(1, job.rows - job.next_row + 1))
            batches[-1].add(job, rows)
            if rows < 5:
                batches.append(Batch(key))
    staging = Staging()
    for batch in batches:
        if batch.parts:
            batch.compute(staging)
    return batches


def outcome(job: Job) -> object:
    """What a caller sees: the error, or every byte of the reply."""
    if isinstance(job.outcome, InvalidArgument):
        return type(job.outcome).__name__, str(job.outcome), job.outcome.position
    assert job.outcome is None
    return job.result.tobytes()


def encode(tokenizer: Any, latents: list[np.ndarray], drawn: Drawn, kinds: list[np.dtype], *, wide: bool) -> list[Job]:
    key = EncodeKey(tokenizer, np.dtype(np.float64 if wide else np.float32))
    jobs: list[Job] = []
    for number, (array, kind) in enumerate(zip(latents, kinds, strict=True)):
        layout = drawn.requests[number][1]
        grid = grid_shape(array.shape, layout)
        found = fenced(np.full(grid, 77, kind), before=number % 2)
        rows = int(np.prod(grid))
        jobs.append(EncodeJob(key, CALLER, fenced(array, before=number % 3), found, layout, rows=rows, on_done=nothing))
    compute(tokenizer, jobs, key, np.random.default_rng(len(latents)))
    return jobs


@pytest.mark.parametrize("wide", [False, True])
def test_encode(tokenizer: Tokenizer, *, wide: bool) -> None:
    for seed in range(40):
        drawn = Drawn(tokenizer, seed)
        latents, kinds = drawn.encode(wide=wide)
        if seed % 2:
            # One value of one request.
            broken = latents[drawn.rng.integers(len(latents))].reshape(-1)
            value = np.array([np.nan, np.inf, -np.inf][seed % 3], np.float32)
            broken[drawn.rng.integers(broken.size)] = dtypes.LATENTS_BY_STORAGE[broken.dtype].narrow(value)
        found, wanted = (
            [outcome(job) for job in encode(each, latents, drawn, kinds, wide=wide)]
            for each in (tokenizer, RowByRow(tokenizer))
        )
        assert found == wanted, seed
        assert sum(isinstance(each, tuple) for each in found) == seed % 2


def decode(tokenizer: Any, indices: list[np.ndarray], drawn: Drawn, key: DecodeKey) -> list[Job]:
    jobs: list[Job] = []
    for number, array in enumerate(indices):
        layout = drawn.requests[number][1]
        shape = latents_shape(array.shape, key.channels, layout)
        latents = fenced(np.full(shape, 77, key.dtype), before=number % 2)
        source = fenced(array, before=number % 3)
        jobs.append(DecodeJob(key, CALLER, source, latents, layout, rows=array.size, on_done=nothing))
    compute(tokenizer, jobs, key, np.random.default_rng(len(indices)))
    return jobs


@pytest.mark.parametrize("dtype", LATENTS)
def test_decode(tokenizer: Tokenizer, dtype: np.dtype) -> None:
    for seed in range(20):
        drawn = Drawn(tokenizer, seed)
        indices = [
            drawn.rng.integers(0, tokenizer.decodable, grid_shape(shape, layout)).astype(
                INDICES[drawn.rng.integers(len(INDICES))]
            )
            for shape, layout in drawn.requests
        ]
        is_broken = seed % 2 and tokenizer.decodable < 256
        if is_broken:
            broken = indices[drawn.rng.integers(len(indices))].reshape(-1)
            outside = [tokenizer.decodable, 255, -1 if broken.dtype.kind == "i" else 255]
            broken[drawn.rng.integers(broken.size)] = outside[seed % 3]
        found, wanted = (
            [outcome(job) for job in decode(each, indices, drawn, DecodeKey(each, "latents", dtype))]
            for each in (tokenizer, RowByRow(tokenizer))
        )
        assert found == wanted, seed
        assert sum(isinstance(each, tuple) for each in found) == bool(is_broken)


def test_values_beyond_the_range_of_the_reply() -> None:
    """A table that does not fit the reply's type goes the general way, as do rows that the search leaves open."""
    quantizer = VectorQuantizer(4, 2)
    weight = torch.tensor([[1.0, 2.0], [70000.0, 0.0], [3.0, 4.0], [-7.0, 1e30]])
    quantizer.load_state_dict({"embedding.weight": weight})
    tokenizer = Tokenizer(quantizer, device="cpu")
    key = DecodeKey(tokenizer, "latents", np.dtype(np.float16))
    jobs = [
        DecodeJob(key, CALLER, np.array(ids), np.zeros((2, 2), "f2"), Layout.CHANNELS_LAST, rows=2, on_done=nothing)
        for ids in ([0, 2], [2, 1])
    ]
    compute(tokenizer, jobs, key, np.random.default_rng(0))
    assert jobs[0].result.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert str(jobs[1].outcome).startswith("indices[1] decodes to a value beyond the range of float16")
    rows = np.array([[1, 2], [1e300, -1e300], [-1e300, 1e300], [3, 4]])
    encode_key = EncodeKey(tokenizer, rows.dtype)
    found = np.zeros(4, np.uint8)
    job = EncodeJob(encode_key, CALLER, rows, found, Layout.CHANNELS_LAST, rows=4, on_done=nothing)
    compute(tokenizer, [job], encode_key, np.random.default_rng(0))
    assert found.tolist() == [0, 1, 3, 2]


def test_searches_are_counted() -> None:
    tokenizer = with_duplicates()
    counts = SearchCounts()
    tokenizer.count_searches(counts)
    key = EncodeKey(tokenizer, np.dtype(np.float32))
    # Halfway between two codes, which float32 and float64 leave open.
    rows = tokenizer.decode_rows(np.array([0, 1]))
    latents = np.stack([rows[0], (rows[0] + rows[1]) / 2, rows[1]])
    found = np.zeros(3, np.uint8)
    job = EncodeJob(key, CALLER, latents, found, Layout.CHANNELS_LAST, rows=3, on_done=nothing)
    batch = Batch(key)
    batch.add(job, 3)
    batch.compute(Staging())
    assert batch.is_in_place
    assert found.tolist() == tokenizer.encode_rows(latents).tolist()
    assert counts.rows == 6
    assert counts.rechecked % 2 == counts.arbitrated % 2 == 0


def test_what_is_sampled_is_what_was_computed() -> None:
    """Rows of callers and their indices; none of the server's own, and none of a request that failed."""
    tokenizer = vector(300, 4)
    key = EncodeKey(tokenizer, np.dtype(np.float32))
    rng = np.random.default_rng(0)
    latents = [rng.standard_normal((5, 4)).astype("f4") for _ in range(4)]
    latents[2][1, 1] = np.nan
    jobs = [
        EncodeJob(
            key,
            CANARY if number == 1 else CALLER,
            array,
            np.zeros(5, np.uint16),
            Layout.CHANNELS_LAST,
            rows=5,
            on_done=nothing,
        )
        for number, array in enumerate(latents)
    ]
    batch = Batch(key)
    for job in jobs:
        batch.add(job, 5)
    batch.compute(Staging())
    assert batch.is_in_place
    sample = batch.sample([1, 4, 5, 9, 11, 15, 19])
    assert sample is not None
    rows, indices = sample
    assert rows.tolist() == [each.tolist() for each in (latents[0][1], latents[0][4], latents[3][0], latents[3][4])]
    assert indices.dtype == np.int64
    assert indices.tolist() == tokenizer.encode_rows(rows).tolist()
    assert batch.sample([6]) is None
