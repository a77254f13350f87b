"""Distances to the nearest other code, against all differences in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vqserve_tools.inspection import codes as module
from vqserve_tools.inspection.codes import draw_codes, nearest_other
from vqserve_tools.progress import progress_of


def measured(codes, drawn):
    with progress_of("measuring", len(drawn), "code", shown=False) as progress:
        return nearest_other(codes.numpy(), np.asarray(drawn), progress)


def expected(codes):
    wide = codes.double().numpy()
    distances = np.sqrt(((wide[:, None] - wide) ** 2).sum(axis=2))
    np.fill_diagonal(distances, np.inf)
    return distances.min(axis=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num_codes", "dim"), [(2, 1), (256, 3), (257, 3), (600, 2), (1400, 16), (513, 70)])
def test_all_codes(num_codes, dim, dtype):
    codes = torch.randn(num_codes, dim, generator=torch.Generator().manual_seed(num_codes)).to(dtype)
    # Equal codes, some of them near each other in the codebook and some not, and one far away.
    codes[num_codes // 2] = codes[0]
    codes[-1] = codes[-2]
    codes[num_codes // 3] += 1e4
    np.testing.assert_allclose(measured(codes, torch.arange(num_codes)), expected(codes), rtol=1e-12)


def test_codes_that_differ_by_an_ulp_are_not_equal():
    codes = torch.randn(900, 8, generator=torch.Generator().manual_seed(0)) + 1000
    codes[750] = codes[3]
    codes[750, 0] = torch.nextafter(codes[3, 0], torch.tensor(torch.inf))
    codes[880] = codes[4]
    found = measured(codes, torch.arange(900))
    assert found[3] == found[750] == float(codes[750, 0].double() - codes[3, 0].double())
    assert found[4] == found[880] == 0


def test_one_code_has_no_other():
    assert measured(torch.ones(1, 3), torch.arange(1)).tolist() == [np.inf]


def test_drawn_codes_are_held_against_all(monkeypatch):
    codes = torch.randn(1000, 5, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(draw_codes(1000, 5), np.arange(1000))
    monkeypatch.setattr(module, "_MOST_PRODUCTS", 1000 * 5 * 530)
    drawn = draw_codes(1000, 5)
    assert drawn.size == 530 == np.unique(drawn).size
    assert np.array_equal(drawn, np.sort(drawn))
    assert np.array_equal(drawn, draw_codes(1000, 5))
    np.testing.assert_allclose(measured(codes, drawn), expected(codes)[drawn], rtol=1e-12)
