"""Search on a GPU: every backend gives the tokens that the CPU gives."""

from __future__ import annotations

import pytest
import torch

from vqserve_server.search import Objective, available, prepare
from vqserve_server.search.rounding import affine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
BACKENDS = available("cuda") if torch.cuda.is_available() else ("torch",)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize(("k", "d"), [(1, 1), (8192, 3), (16384, 4), (16384, 8), (8192, 64), (1024, 256), (512, 1024)])
def test_tokens_are_those_of_the_cpu(backend, objective, k, d):
    g = torch.Generator().manual_seed(k + d)
    codes = torch.randn(k, d, generator=g)
    bias = None if objective is Objective.L2 else torch.randn(k, generator=g)
    near = codes[torch.randint(k, (500,), generator=g)]
    ties = (near + codes[torch.randint(k, (500,), generator=g)]) / 2
    rows = torch.cat([torch.randn(3000, d, generator=g), near, ties])
    expected = prepare(codes, objective=objective, bias=bias).search(rows)
    on_gpu = prepare(codes.cuda(), objective=objective, bias=None if bias is None else bias.cuda(), backend=backend)
    assert torch.equal(on_gpu.search(rows.cuda()).cpu(), expected)
    assert torch.equal(on_gpu.search(rows.double().cuda()).cpu(), expected)
    shuffled = torch.randperm(len(rows), generator=g)
    parts = [on_gpu.search(rows[part].cuda()).cpu() for part in shuffled.split(777)]
    assert torch.equal(torch.cat(parts), expected[shuffled])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_precision_does_not_reach_the_search(backend, precision):
    g = torch.Generator().manual_seed(0)
    codes, rows = torch.randn(4096, 64, generator=g), torch.randn(4096, 64, generator=g)
    expected = prepare(codes).search(rows)
    torch.set_float32_matmul_precision(precision)
    try:
        assert torch.equal(prepare(codes.cuda(), backend=backend).search(rows.cuda()).cpu(), expected)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_projections_are_rounded_alike():
    g = torch.Generator().manual_seed(1)
    rows, weight, bias = (torch.randn(*shape, generator=g) for shape in ((5000, 96), (8, 96), (8,)))
    assert torch.equal(affine(rows.cuda(), weight.cuda(), bias.cuda()).cpu(), affine(rows, weight, bias))


def test_a_full_batch_takes_few_launches_without_triton():
    g = torch.Generator().manual_seed(2)
    codes, rows = torch.randn(16384, 4, generator=g), torch.randn(16384, 4, generator=g)
    searcher = prepare(codes.cuda(), backend="torch")
    on_gpu = rows.cuda()
    searcher.search(on_gpu)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        winners = searcher.search(on_gpu)
        torch.cuda.synchronize()
    assert torch.equal(winners.cpu(), prepare(codes).search(rows))
    # Tiles as small as those of the CPU make 14,742 of them.
    assert sum(event.count for event in profile.key_averages()) < 1000
