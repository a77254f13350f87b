"""Torch's tiles: what they do when float32 cannot be trusted, and with more codes than a tile holds."""

import pytest
import torch

from vqserve_server.search import Objective, SearchCounts, prepare
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
def test_products_of_fewer_bits_are_not_used(precision, way, expected):
    codes = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    reference = TiledSearcher(codes, None, Objective.L2, dtype=torch.float64)
    searched = []

    class Spy:
        def search(self, rows, counts=None):
            searched.append(len(rows))
            return reference.search(rows, counts)

    searcher = TiledSearcher(codes, None, Objective.L2, dtype=torch.float32, fallback=Spy)
    precision(way)
    assert torch.equal(searcher.search(codes[:50]), torch.arange(50))
    assert searched == expected


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
