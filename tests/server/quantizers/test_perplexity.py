"""measure_perplexity against its formula."""

from __future__ import annotations

import pytest
import torch

from vqserve_server.errors import IndexOutOfRange, InvalidDtype, InvalidOption, InvalidShape
from vqserve_server.quantizers import measure_perplexity


@pytest.mark.parametrize("shape", [(60,), (3, 20), (3, 4, 5), (2, 3, 5, 2)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_the_formula_for_any_shape_and_integer_type(shape, dtype):
    torch.manual_seed(0)
    indices = torch.randint(0, 40, shape)
    p = torch.nn.functional.one_hot(indices.flatten(), 64).double().mean(0)
    perplexity, in_use = measure_perplexity(indices.to(dtype), 64)
    assert perplexity.dtype == torch.float32
    assert in_use.dtype == torch.int64
    assert perplexity.shape == in_use.shape == ()
    torch.testing.assert_close(perplexity.double(), torch.exp(-(p * torch.log(p + 1e-10)).sum()), rtol=1e-5, atol=0)
    assert int(in_use) == indices.unique().numel()


def test_extremes():
    even, used = measure_perplexity(torch.arange(64), 64)
    assert abs(even.item() - 64) < 1e-3
    assert used.item() == 64
    single, used = measure_perplexity(torch.full((9,), 3), 64)
    assert abs(single.item() - 1) < 1e-6
    assert used.item() == 1


def test_what_has_no_perplexity_is_rejected():
    with pytest.raises(InvalidShape, match=r"\(0, 3\)"):
        measure_perplexity(torch.zeros(0, 3, dtype=torch.int64), 4)
    with pytest.raises(InvalidDtype):
        measure_perplexity(torch.zeros(3), 4)
    with pytest.raises(InvalidOption):
        measure_perplexity(torch.zeros(3, dtype=torch.int64), 0)
    for bad in (-1, 4):
        with pytest.raises(IndexOutOfRange, match=rf"indices\[1\] is {bad}"):
            measure_perplexity(torch.tensor([0, bad]), 4)


def test_no_gradient_and_no_dense_one_hot():
    # 2^20 tokens times 2^20 centroids could not be held.
    perplexity, in_use = measure_perplexity(torch.arange(1 << 20) // 2, 1 << 20)
    assert in_use.item() == 1 << 19
    assert abs(perplexity.item() / (1 << 19) - 1) < 1e-3
    assert not perplexity.requires_grad


def test_nothing_waits_for_a_device():
    # A meta tensor has no values: whatever looks at one on the host (.item(), bool, int) raises.
    perplexity, in_use = measure_perplexity(torch.zeros(3, 5, dtype=torch.int64, device="meta"), 4)
    assert perplexity.device.type == in_use.device.type == "meta"
    assert (perplexity.dtype, in_use.dtype) == (torch.float32, torch.int64)
    with pytest.raises(RuntimeError, match="meta"):
        perplexity.item()
