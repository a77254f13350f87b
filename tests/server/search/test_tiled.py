"""Torch's tiles: what they do when float32 cannot be trusted, and with more codes than a tile holds."""

import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vqserve_server.search import Objective, SearchCounts, prepare, tiled
from vqserve_server.search.tiled import TiledSearcher, tile_shape

MIB = 1 << 20


@pytest.fixture
def precision():
    """Sets how float32 products are computed, by either of torch's ways, until the test ends."""

    def allow(way):
        if way == "older":
            torch.set_float32_matmul_precision("medium")
        elif way == "newer":
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"

    yield allow
    torch.set_float32_matmul_precision("highest")
    torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.parametrize(("way", "expected"), [("none", []), ("older", [50]), ("newer", [50])])
def test_products_of_fewer_bits_are_not_used(precision, caplog, way, expected):
    caplog.set_level(logging.INFO)
    codes = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    reference = TiledSearcher(codes, None, Objective.L2, dtype=torch.float64)
    searched = []

    class Spy:
        backend = "reference"

        def search(self, rows, counts=None):
            searched.append(len(rows))
            return reference.search(rows, counts)

    searcher = TiledSearcher(codes, None, Objective.L2, dtype=torch.float32, fallback=Spy)
    precision(way)
    assert torch.equal(searcher.search(codes[:50]), torch.arange(50))
    assert searched == expected
    searcher.search(codes[:50])
    told = [line for line in caplog.messages if line.startswith("search_falls_back ")]
    assert len(told) == len(expected)
    assert all("to=reference" in line and "set_float32_matmul_precision" in line for line in told)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_codebooks_larger_than_a_tile(backend):
    g = torch.Generator().manual_seed(1)
    codes = torch.randn(5000, 600, generator=g)
    codes[4999] = codes[17]
    rows = torch.cat([codes[[4998, 17, 3, 2500]], (codes[10:20] + codes[4010:4020]) / 2])
    counts = SearchCounts()
    winners = prepare(codes, backend=backend).search(rows, counts)
    assert winners[:4].tolist() == [4998, 17, 3, 2500]
    assert torch.equal(winners, prepare(codes).search(rows))
    assert counts.rows == len(rows)


def test_rows_near_to_every_code_are_searched_once_each():
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 7)
    for dtype in (torch.float32, torch.float64):
        searcher = TiledSearcher(
            corners,
            None,
            Objective.L2,
            dtype=dtype,
            fallback=None,
        )
        assert searcher.search(torch.zeros(1000, 7)).tolist() == [0] * 1000


@pytest.mark.parametrize(
    ("device", "num_codes", "dim", "tiles"),
    [
        # A full batch for the codebook of latent diffusion's f = 8: 1 GiB of scores.
        ("cpu", 16384, 4, 256),
        ("cuda", 16384, 4, 4),
        # The codes of a tile are bounded, too: 2048 and 16384 of them.
        ("cpu", 16384, 512, 256),
        ("cuda", 16384, 512, 4),
        ("cpu", 16, 4, 1),
        ("cuda", 16, 4, 1),
    ],
)
def test_tiles_are_larger_on_cuda(device, num_codes, dim, tiles):
    count = 16384
    rows, codes = tile_shape(num_codes, dim, torch.float32, torch.device(device))
    assert -(-count // rows) * -(-num_codes // codes) == tiles
    limit = {"cpu": 4 * MIB, "cuda": 256 * MIB}[device]
    assert 4 * rows * codes <= limit
    assert 4 * codes * dim <= limit


def test_one_row_and_one_code_are_a_tile_however_long_they_are():
    assert tile_shape(2, 4 * MIB, torch.float64, torch.device("cpu")) == (524288, 1)


@pytest.mark.parametrize(("free", "size"), [(80 << 30, 256), (800 * MIB, 100), (MIB, 4)])
def test_tiles_fit_what_the_device_has_free(free, size):
    rows, codes = tile_shape(16384, 4, torch.float32, torch.device("cuda"), free)
    assert (rows * codes * 4, codes) == (size * MIB, 16384)


# Operations that only make a view, or memory, start nothing on the device.
_NO_LAUNCH = {"aten::detach", "aten::slice", "aten::select", "aten::t", "aten::unsqueeze", "aten::empty", "aten::alias"}
_NO_LAUNCH |= {"aten::view", "aten::transpose", "aten::expand", "aten::permute", "aten::as_strided", "aten::unbind"}
# Those whose result the host waits for.
_SYNCS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2", "aten::unique_dim"}


class Counted(TorchDispatchMode):
    """Counts what a search would start on a GPU and wait for there."""

    def __init__(self):
        super().__init__()
        self.launches = self.syncs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition(".")[0]
        self.launches += name not in _NO_LAUNCH
        self.syncs += name in _SYNCS
        return func(*args, **(kwargs or {}))


def test_a_full_batch_is_few_launches_on_cuda(monkeypatch):
    # As many tiles as a batch of 16384 rows has on CUDA with the 16384 codes of ldm-f8; both are 32 times fewer here.
    monkeypatch.setitem(tiled._TILE_BYTES, "cpu", (256 * MIB) // 32**2)
    g = torch.Generator().manual_seed(3)
    codes, rows = torch.randn(512, 4, generator=g), torch.randn(512, 4, generator=g)
    searcher = TiledSearcher(codes, None, Objective.L2, dtype=torch.float32)
    with Counted() as counted:
        winners = searcher.search(rows)
    assert torch.equal(winners, prepare(codes).search(rows))
    # With the CPU's tiles there were 14,742 and 1,566 of them.
    assert counted.launches < 300
    assert counted.syncs < 40
