"""Kernels that were compiled ahead of time, on a GPU: they load, and find what the CPU finds."""

from __future__ import annotations

import pytest
import torch

from vqserve_server.search import Objective, prepare
from vqserve_server.search.cuda import cubins
from vqserve_server.search.cuda.choice import CompiledLauncher
from vqserve_server.search.cuda.driver import Driver, DriverError
from vqserve_server.search.cuda.searcher import CudaSearcher
from vqserve_server.search.cuda.variants import all_variants, architecture_of
from vqserve_server.search.tiled import TiledSearcher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    pytest.importorskip("triton", reason="needs Triton, which compiles the kernels")
    folder, capability = tmp_path_factory.mktemp("compiled"), torch.cuda.get_device_capability()
    cubins.build(folder, [architecture_of(capability)])
    index = cubins.read_index(folder)
    try:
        return CompiledLauncher(index, folder, capability, Driver(0), lambda: torch.cuda.current_stream(0).cuda_stream)
    except cubins.Unusable as error:
        pytest.skip(str(error))


def test_every_variant_of_the_architecture_is_loaded(launcher):
    architecture = architecture_of(torch.cuda.get_device_capability())
    assert set(launcher._kernels) == {variant.name for variant in all_variants(architecture)}


@pytest.mark.parametrize("dim", [1, 3, 4, 8, 17, 32, 64, 128, 256])
def test_they_find_what_the_cpu_finds_on_any_stream(launcher, dim):
    g = torch.Generator().manual_seed(dim)
    codes, rows = torch.randn(1000, dim, generator=g), torch.randn(3000, dim, generator=g)
    on_gpu = codes.cuda()
    searcher = CudaSearcher(
        on_gpu,
        None,
        Objective.L2,
        fallback=lambda: TiledSearcher(on_gpu, None, Objective.L2, dtype=torch.float64),
        launcher=launcher,
    )
    expected = prepare(codes).search(rows)
    assert torch.equal(searcher.search(rows.cuda()).cpu(), expected)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert torch.equal(searcher.search(rows.cuda()).cpu(), expected)


def test_the_driver_refuses_what_is_no_kernel():
    with pytest.raises(DriverError, match="cuModuleLoadData"):
        Driver(0).load(b"no machine code" * 100, "nearest", [], warps=4, shared=0)
