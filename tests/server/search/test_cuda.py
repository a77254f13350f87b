"""The CUDA kernels, in Triton's interpreter where there is no GPU."""

import sys

import pytest
import torch

from vqserve_server.search import Objective, SearchCounts, available
from vqserve_server.search.cuda import fits, is_available
from vqserve_server.search.cuda.jit import JitLauncher
from vqserve_server.search.cuda.searcher import CudaSearcher
from vqserve_server.search.tiled import TiledSearcher

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# Triton decides when it is imported whether kernels are interpreted, and asks again when it interprets.
with pytest.MonkeyPatch.context() as patch:
    if not torch.cuda.is_available():
        assert "triton" not in sys.modules, "imported before the interpreter could be turned on"
        patch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton", reason="Triton is not installed")
    import vqserve_server.search.cuda.kernels  # noqa: F401


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def fused(codes, bias=None, objective=Objective.L2):
    def fallback():
        return TiledSearcher(codes, bias, objective, dtype=torch.float64)

    return CudaSearcher(codes, bias, objective, fallback=fallback, launcher=JitLauncher()), fallback()


@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize(("k", "d", "n"), [(1, 1, 3), (100, 3, 70), (513, 17, 130), (64, 200, 10), (65, 64, 64)])
def test_it_agrees_with_the_reference(objective, k, d, n):
    device = DEVICES[-1]
    g = torch.Generator().manual_seed(k)
    codes, rows = torch.randn(k, d, generator=g).to(device), torch.randn(n, d, generator=g).to(device)
    bias = None if objective is Objective.L2 else torch.randn(k, generator=g).to(device)
    searcher, reference = fused(codes, bias, objective)
    counts = SearchCounts()
    assert torch.equal(searcher.search(rows, counts), reference.search(rows))
    assert counts.rows == n
    assert torch.equal(searcher.search(rows.double()), reference.search(rows.double()))
    assert searcher.search(rows[:0]).shape == (0,)


def test_near_ties_go_to_the_fallback_and_nothing_else_does():
    device = DEVICES[-1]
    g = torch.Generator().manual_seed(0)
    codes = torch.randn(200, 6, generator=g).to(device)
    ties = (codes[:20] + codes[20:40]) / 2
    rows = torch.cat([codes, ties])
    searcher, reference = fused(codes)
    counts = SearchCounts()
    assert torch.equal(searcher.search(rows, counts), reference.search(rows))
    assert counts.rechecked <= 20
    everywhere = torch.cat([codes, codes[:, [1, 0, 2, 3, 4, 5]]])
    mirrored = rows.clone()
    mirrored[:, 1] = mirrored[:, 0]
    searcher, reference = fused(everywhere)
    counts = SearchCounts()
    assert torch.equal(searcher.search(mirrored, counts), reference.search(mirrored))
    assert counts.rechecked == len(mirrored)


def test_rows_that_are_not_finite_do_not_touch_others():
    device = DEVICES[-1]
    codes = torch.randn(90, 5, generator=torch.Generator().manual_seed(1)).to(device)
    rows = codes.clone()
    rows[3, 2], rows[70] = float("nan"), float("inf")
    got = fused(codes)[0].search(rows)
    kept = [i for i in range(90) if i not in (3, 70)]
    assert got[kept].tolist() == kept
    assert ((got >= 0) & (got < 90)).all()


def test_what_is_beyond_the_kernel_s_32_bits_is_rejected_or_cut(monkeypatch):
    assert not fits(torch.empty(2**21, 1024, device="meta"))
    assert fits(torch.empty(2**21 - 1, 1024, device="meta"))
    device = DEVICES[-1]
    g = torch.Generator().manual_seed(2)
    codes, rows = torch.randn(70, 5, generator=g).to(device), torch.randn(400, 5, generator=g).to(device)
    rows[100] = (codes[3] + codes[4]) / 2
    searcher, reference = fused(codes)
    searched = []
    search_part = searcher._search_part
    monkeypatch.setattr(searcher, "_search_part", lambda z, *rest: (searched.append(z.numel()), search_part(z, *rest)))
    monkeypatch.setattr("vqserve_server.search.cuda.searcher._MOST_ELEMENTS", 699)
    assert torch.equal(searcher.search(rows), reference.search(rows))
    assert searched == [640, 640, 640, 80]


def test_it_is_listed_where_it_runs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "triton" not in available("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert is_available(torch.device("cpu"))
    assert available("cpu")[-2:] == ("reference", "triton")


def test_rows_may_begin_anywhere_in_memory():
    device = DEVICES[-1]
    g = torch.Generator().manual_seed(5)
    codes, rows = torch.randn(31, 3, generator=g).to(device)[1:], torch.randn(40, 3, generator=g).to(device)[1:]
    began = []

    class Noting(JitLauncher):
        def launch(self, variant, grid, args):
            began.extend(one.data_ptr() % 16 for one in args if isinstance(one, torch.Tensor))
            super().launch(variant, grid, args)

    _, reference = fused(codes)
    searcher = CudaSearcher(codes, None, Objective.L2, fallback=lambda: reference, launcher=Noting())
    assert torch.equal(searcher.search(rows), reference.search(rows))
    assert set(began) == {0}
