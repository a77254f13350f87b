"""The compiled search: every instruction set, odd sizes, and what float32 cannot take."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from vqserve_server.errors import InvalidArgument
from vqserve_server.search import Objective, SearchCounts, available, prepare
from vqserve_server.search.native import NativeSearcher, levels
from vqserve_server.search.native.tensors import TensorSearcher
from vqserve_server.search.tiled import TiledSearcher

pytestmark = pytest.mark.skipif(not levels(), reason="the compiled search was not built for this platform")


def reference(codes, bias=None, objective=Objective.L2):
    return TiledSearcher(codes, bias, objective, dtype=torch.float64)


def native(codes, bias=None, objective=Objective.L2, level=None):
    return compiled(codes, bias, objective, lambda: reference(codes, bias, objective), level)


def compiled(codes, bias, objective, fallback, level=None):
    arrays = codes.numpy(), None if bias is None else bias.numpy()
    return TensorSearcher(NativeSearcher(*arrays, objective, fallback=fallback, level=level))


def test_it_is_the_first_choice_on_a_cpu():
    assert available("cpu")[0] == "native"
    assert prepare(torch.randn(9, 3)).backend == "native"


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("k", [1, 2, 15, 16, 17, 47, 48, 49, 255, 256, 257, 1000])
@pytest.mark.parametrize("d", [1, 2, 3, 5, 8, 9, 33])
def test_odd_sizes(level, k, d):
    g = torch.Generator().manual_seed(k * 100 + d)
    codes = torch.randn(k, d, generator=g)
    rows = torch.cat(
        [torch.randn(29, d, generator=g), codes[:9], (codes[:5] + codes[-5:].flip(0)[: len(codes[:5])]) / 2]
    )
    expected = reference(codes).search(rows)
    searcher = native(codes, level=level)
    for count in (0, 1, 7, 8, 9, 16, len(rows)):
        assert torch.equal(searcher.search(rows[:count]), expected[:count])
    assert torch.equal(searcher.search(rows.double()), expected)
    bias = torch.randn(k, generator=g)
    dot = native(codes, bias, Objective.DOT, level=level)
    assert torch.equal(dot.search(rows), reference(codes, bias, Objective.DOT).search(rows))


@pytest.mark.long
@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("d", [3, 64])
def test_many_rows_on_many_threads(level, d):
    g = torch.Generator().manual_seed(d)
    codes, rows = torch.randn(3000, d, generator=g), torch.randn(5000, d, generator=g)
    assert torch.equal(native(codes, level=level).search(rows), reference(codes).search(rows))


def test_rows_of_any_memory_layout():
    g = torch.Generator().manual_seed(0)
    codes, latents = torch.randn(300, 6, generator=g), torch.randn(6, 40, generator=g)
    searcher = native(codes)
    assert torch.equal(searcher.search(latents.T), searcher.search(latents.T.contiguous()))
    wide = torch.randn(40, 12, generator=g)
    assert torch.equal(searcher.search(wide[:, ::2]), searcher.search(wide[:, ::2].contiguous()))


@pytest.mark.parametrize("magnitude", [1e-38, 1e-20, 1e18, 3e37])
def test_rows_far_beyond_the_codes(magnitude):
    g = torch.Generator().manual_seed(1)
    codes = torch.randn(400, 4, generator=g)
    rows = torch.cat([torch.randn(20, 4, generator=g) * magnitude, torch.zeros(1, 4)])
    assert torch.equal(native(codes).search(rows), reference(codes).search(rows))


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("k", [20, 300])
def test_float64_rows_that_overflow_once_scaled(level, k):
    g = torch.Generator().manual_seed(2)
    codes = torch.randn(k, 4, generator=g) * 1e-12
    rows = (torch.rand(20, 4, generator=g, dtype=torch.float64) * 2 - 1) * 1.7e308
    winners = native(codes, level=level).search(rows)
    assert torch.equal(winners, reference(codes).search(rows))
    assert winners.any()


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks for a page that must not be read")
@pytest.mark.parametrize("level", levels())
def test_no_bound_is_read_that_is_not_there(level):
    script = """
import ctypes, mmap, sys
import numpy as np, torch
from vqserve_server.search import Objective
from vqserve_server.search.native import NativeSearcher
codes = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
searcher = NativeSearcher(codes.numpy(), None, Objective.L2, fallback=lambda: None, level=sys.argv[1])
pages = []
for name in ("error_slope", "error_base"):
    # The array again, at the end of a page that nothing may be read beyond.
    array = getattr(searcher.book, name)
    pages.append(mmap.mmap(-1, 2 * mmap.PAGESIZE))
    place = np.frombuffer(pages[-1], np.float32, array.size, mmap.PAGESIZE - array.nbytes)
    place[:] = array
    address = place.ctypes.data + array.nbytes
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, 0) == 0
    setattr(searcher.book.struct, name, place.ctypes.data)
# So far away that squared distances overflow: every box is in reach, and so would be those that fill a vector up.
rows = torch.randn(9, 3, generator=torch.Generator().manual_seed(1)) * 1e25
print(searcher.search(rows.numpy()).tolist())
"""
    command = [sys.executable, "-c", script, level]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=True)
    codes = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    rows = torch.randn(9, 3, generator=torch.Generator().manual_seed(1)) * 1e25
    assert done.stdout.strip() == str(reference(codes).search(rows).tolist())


def reject():
    raise AssertionError("rows were left to the fallback")


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_lattice_is_settled_in_compiled_code(level, dtype):
    axis = torch.arange(8, dtype=torch.float32)
    codes = torch.cartesian_prod(axis, axis, axis)
    # Centres of cells are as near to eight codes, outside to four or two; only the last corner is near to one.
    rows = codes.to(dtype) + 0.5
    searcher = compiled(codes, None, Objective.L2, reject, level)
    counts = SearchCounts()
    winners = searcher.search(rows, counts)
    assert torch.equal(winners, reference(codes).search(rows))
    assert counts == SearchCounts(rows=512, rechecked=511, arbitrated=511)


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("d", [3, 40])
def test_float64_rows_a_hair_from_the_middle_are_settled_in_compiled_code(level, d):
    g = torch.Generator().manual_seed(d)
    codes = torch.randint(1, 17, (300, d), generator=g).float()
    # Midpoints of neighbours, exact in float64, and the numbers beside them: a difference that only products of twice
    # float64's precision show.
    middle = (codes[:-1].double() + codes[1:].double()) / 2
    above = torch.nextafter(middle, torch.full_like(middle, torch.inf))
    rows = torch.cat([middle, above, middle * (1 + 2.0**-40)])
    searcher = compiled(codes, None, Objective.L2, reject, level)
    assert torch.equal(searcher.search(rows), reference(codes).search(rows))


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8, 9, 15])
def test_few_rows_share_the_codes_among_threads(level, count):
    g = torch.Generator().manual_seed(count)
    codes = torch.round(torch.randn(40000, 96, generator=g) * 8) / 8
    rows = (codes[:count] + codes[-count:]) / 2
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        got = native(codes, level=level).search(rows)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(got, reference(codes).search(rows))


@pytest.mark.parametrize("level", levels())
def test_boxes_of_boxes(level):
    # More blocks than one group of groups of boxes holds, and a last group that is not full.
    g = torch.Generator().manual_seed(0)
    codes = torch.randn(40001, 3, generator=g)
    rows = torch.cat([torch.randn(500, 3, generator=g), torch.randn(20, 3, generator=g) * 100, codes[-50:]])
    assert torch.equal(native(codes, level=level).search(rows), reference(codes).search(rows))


def test_searches_at_once_do_not_mix():
    g = torch.Generator().manual_seed(0)
    books = [torch.randn(k, d, generator=g) for k, d in ((3000, 4), (2000, 64), (500, 16))]
    work = [(native(codes), torch.randn(3000, codes.shape[1], generator=g)) for codes in books]
    expected = [searcher.search(rows) for searcher, rows in work]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(10):
            got = pool.map(lambda pair: pair[0].search(pair[1]), work * 2)
            assert all(torch.equal(*pair) for pair in zip(got, expected * 2, strict=True))


def test_rows_with_more_near_codes_than_it_keeps_go_to_the_fallback():
    # The corners of a cube in eight dimensions: its centre is as near to all 256.
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 8)
    left = []

    class Fallback:
        backend = "reference"

        def search(self, rows):
            left.append(len(rows))
            return reference(corners).search(rows)

    searcher = compiled(corners, None, Objective.L2, Fallback)
    rows = torch.cat([torch.zeros(3, 8), corners[7:9]])
    assert searcher.search(rows).tolist() == [0, 0, 0, 7, 8]
    assert left == [3]


def test_counts_contain_the_rows_that_were_searched_again():
    g = torch.Generator().manual_seed(3)
    codes = torch.randn(2000, 4, generator=g)
    counts = SearchCounts()
    native(codes).search(torch.randn(4000, 4, generator=g), counts)
    assert counts.rows == 4000
    assert counts.rechecked < 200
    assert counts.arbitrated <= counts.rechecked


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_do_not_touch_their_group(value):
    g = torch.Generator().manual_seed(4)
    codes, rows = torch.randn(500, 4, generator=g), torch.randn(40, 4, generator=g)
    expected = reference(codes).search(rows)
    harmed = rows.clone()
    harmed[5, 1] = harmed[17] = value
    got = native(codes).search(harmed)
    kept = [i for i in range(40) if i not in (5, 17)]
    assert torch.equal(got[kept], expected[kept])
    assert ((got >= 0) & (got < 500)).all()


def test_a_forked_child_has_threads_of_its_own():
    script = """
import os, torch
from vqserve_server.search import prepare
torch.set_num_threads(2)
codes = torch.randn(4096, 8)
searcher = prepare(codes, backend="native")
searcher.search(codes)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(searcher.search(codes), torch.arange(4096)) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=250, check=True)
    assert done.stdout == "0\n"


@pytest.mark.parametrize(
    "rows",
    [torch.zeros(4, 7), torch.zeros(4, 8, dtype=torch.float16), torch.zeros(8), torch.zeros(4, 8, device="meta")],
)
def test_rows_of_another_width_type_or_device_are_rejected_before_compiled_code_sees_them(rows):
    with pytest.raises(InvalidArgument, match="rows must be"):
        native(torch.zeros(3, 8)).search(rows)


def test_a_default_device_that_is_another_is_not_where_results_go():
    codes = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    twice = torch.cat([codes, codes])
    with torch.device("meta"):
        assert torch.equal(native(codes).search(codes), torch.arange(30, device="cpu"))
        assert torch.equal(prepare(twice).search(codes), torch.arange(30, device="cpu"))


def test_rows_that_torch_has_yet_to_negate():
    row = torch.tensor([[1 + 0.9j]]).conj().imag
    assert row.is_neg()
    assert row.is_contiguous()
    assert native(torch.tensor([[1.0], [-1.0]])).search(row).tolist() == [1]
