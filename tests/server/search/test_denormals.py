"""Subnormal numbers where the process has switched them off: torch.set_flush_denormal, libraries compiled for speed."""

import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from vqserve_server.search import Objective, available, prepare
from vqserve_server.search.rounding import affine, weight_norm

BACKENDS = [name for name in available("cpu") if name != "triton"]
# Switched off when torch starts its threads, which then have them off for good.
SCRIPT = """
import sys
import numpy as np, torch
torch.set_num_threads(2)
torch.set_flush_denormal(True)
torch.ones(1 << 20).double()
from vqserve_server.search import prepare
rng = np.random.default_rng(0)
codes, rows = rng.integers(-4000, 4000, (20000, 4)), rng.integers(-4000, 4000, (12, 4))
codes[-5:] = codes[:5]
codes[5:9] = 0
codes[7] = 1
rows[0] = rows[1] = 0
rows[1, 0] = 1
rows[2:7] = codes[:5]
def tensor(steps):  # of 2^-149 each
    return torch.from_numpy((np.abs(steps) | np.where(steps < 0, -(2**31), 0)).astype(np.int32).view(np.float32))
winners = [int(((codes - row) ** 2).sum(axis=1).argmin()) for row in rows]
searcher = prepare(tensor(codes), backend=sys.argv[1])
torch.set_flush_denormal(sys.argv[2] == "off")
assert searcher.search(tensor(rows)).tolist() == winners, searcher.search(tensor(rows)).tolist()
assert (sys.float_info.min / 2 == 0.0) == (sys.argv[2] == "off"), "another setting than before"
"""


@contextmanager
def switched_off():
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("during_search", ["off", "on"])
def test_codes_and_rows_are_searched_as_stored(backend, during_search):
    command = [sys.executable, "-c", SCRIPT, backend, during_search]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert not done.returncode, done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_they_count_beside_ordinary_numbers(backend, dtype):
    codes = torch.tensor([[1.0, 0.0], [1.0, 2.0**-140], [1.0, -(2.0**-141)]])
    rows = torch.tensor([[1.0, 2.0**-140], [1.0, 2.0**-141], [-3.0, -(2.0**-142)]], dtype=dtype)
    with switched_off():
        assert prepare(codes, backend=backend).search(rows).tolist() == [1, 0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_biases_count(backend):
    codes, bias = torch.eye(3), torch.tensor([0.0, 2.0**-140, 2.0**-141])
    with switched_off():
        searcher = prepare(codes, objective=Objective.DOT, bias=bias, backend=backend)
        assert searcher.search(torch.zeros(1, 3)).tolist() == [1]


@pytest.mark.parametrize(("row_scale", "weight_scale"), [(2.0**-70, 2.0**-70), (2.0**-140, 4.0), (4.0, 2.0**-140)])
def test_affine_gives_them(row_scale, weight_scale):
    g = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.randn(50, 6, generator=g) * row_scale, torch.zeros(1, 6)])
    weight = torch.randn(5, 6, generator=g) * weight_scale
    bias = torch.randn(5, generator=g) * 2.0**-141
    expected = affine(rows, weight, bias)
    assert (expected.abs() < 2.0**-126).all()
    with switched_off():
        got = affine(rows, weight, bias)
    assert torch.equal(got.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize(("v_scale", "gain"), [(2.0**-140, 1.0), (1.0, 2.0**-130)])
def test_weight_norm_takes_and_gives_them(v_scale, gain):
    v = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)) * v_scale
    gains = torch.full((1, 4), gain)
    expected = weight_norm(v, gains)
    with switched_off():
        got = weight_norm(v, gains)
    assert torch.equal(got.view(torch.int32), expected.view(torch.int32))
