"""Residual quantizers that scale every residual to length one before they search: GRID's semantic ids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqserve_server.quantizers import ResidualQuantizer, freeze
from vqserve_server.search import available


def made(seed: int = 0, **arguments) -> ResidualQuantizer:
    given = {"num_quantizers": 3, "n_e": [40, 20, 30], "e_dim": 16, **arguments}
    quantizer = ResidualQuantizer(**given, normalize_residuals=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.normal_(generator=generator).mul_(0.3)
    return quantizer.eval()


def rows_of(count: int, channels: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))


def upstream(quantizer: ResidualQuantizer, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """GRID's own loop in float64: the ids, the sum of the codes, and the gap of each search to the second best."""
    residual, ids, gaps = rows.double(), [], []
    total = torch.zeros_like(residual)
    for stage in quantizer.codebooks():
        residual = torch.nn.functional.normalize(residual, dim=-1)
        codes = stage.code_rows().double()
        distances = (residual[:, None] - codes[None]).square().sum(dim=-1)
        nearest = distances.topk(2, largest=False).values
        ids.append(distances.argmin(dim=1))
        gaps.append(nearest[:, 1] - nearest[:, 0])
        total = total + codes[ids[-1]]
        residual = residual - codes[ids[-1]]
    return torch.stack(ids, dim=1), total, torch.stack(gaps, dim=1)


@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-10, 1e-3, 1.0, 1e10, 1e30]))
@settings(max_examples=30, derandomize=True, database=None)
def test_as_upstream_computes_it_in_float64(seed, scale):
    quantizer = made(seed)
    rows = rows_of(60, 16, seed) * scale
    ids, total, gaps = upstream(quantizer, rows)
    found = quantizer.encode(rows)
    is_clear = (gaps > 1e-5).all(dim=1)
    assert is_clear.sum() > 50
    assert torch.equal(found[is_clear], ids[is_clear])
    decoded = quantizer.decode(ids)
    assert decoded.dtype == torch.float32
    np.testing.assert_allclose(decoded.double().numpy(), total.numpy(), atol=1e-6)


def test_rows_of_zeros_and_residuals_of_zeros():
    quantizer = made(n_e=3, e_dim=2, num_quantizers=2)
    first, second = (stage.embedding.weight for stage in quantizer.codebooks())
    with torch.no_grad():
        first.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.0, 0.5]]))
        # Two codes are as near to zero: the first one wins.
        second.copy_(torch.tensor([[0.0, 4.0], [0.5, 0.0], [0.0, 0.5]]))
    rows = torch.tensor([[0.0, 0.0], [-0.0, 0.0], [7.0, 0.0], [0.0, -1e-30], [0.0, 3.0]])
    # A row of zeros stays one: the code nearest to zero is code 2, and (0, -0.5) becomes (0, -1).
    # (7, 0) is code 0 and leaves zeros; (0, -1e-30) is shorter than 1e-12 and stays near zero; (0, 3) leaves (0, 0.5).
    assert quantizer.encode(rows).tolist() == [[2, 1], [2, 1], [0, 1], [2, 1], [2, 2]]


def test_the_length_of_a_latent_has_no_effect():
    quantizer = made()
    rows = rows_of(200, 16)
    found = quantizer.encode(rows)
    for power in (-30, -3, 1, 100):
        assert torch.equal(quantizer.encode(rows * 2.0**power), found)
    # Of the largest latents, too: nothing overflows.
    largest = rows / rows.abs().amax(dim=1, keepdim=True) * torch.finfo(torch.float32).max
    assert torch.equal(quantizer.encode(largest.double()), quantizer.encode(largest.double() * 1e200))
    assert quantizer.encode(largest).shape == found.shape


def test_residuals_are_float32_also_of_float64_latents():
    quantizer = made()
    rows = rows_of(100, 16).double() + 1e-9
    expected = []
    residual = rows
    for stage in quantizer.codebooks():
        length = np.sqrt(np.square(residual.numpy().astype(np.longdouble)).sum(axis=1, keepdims=True))
        residual = torch.from_numpy((residual.numpy() / length).astype(np.float32))
        expected.append(stage.encode(residual))
        residual = residual - stage.code_rows()[expected[-1]]
    assert torch.equal(quantizer.encode(rows), torch.stack(expected, dim=1))


@pytest.mark.parametrize("search", available("cpu"))
def test_batches_threads_and_backends_agree(search):
    quantizer = made(n_e=[300, 40, 7], e_dim=64)
    rows = rows_of(3000, 64)
    expected = quantizer.encode(rows)
    frozen = freeze(quantizer, device="cpu", search=search)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(frozen.encode_rows(rows), expected)
            assert torch.equal(torch.cat([frozen.encode_rows(part) for part in rows.split(977)]), expected)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(frozen.encode_rows(rows, num_quantizers=2), expected[:, :2])


def test_tiny_numbers_are_not_flushed_to_zero():
    quantizer = made()
    rows = rows_of(50, 16) * 1e-12
    rows[:, 3] = 2.0**-149
    expected = quantizer.encode(rows)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormal numbers")
    try:
        assert torch.equal(quantizer.encode(rows), expected)
    finally:
        torch.set_flush_denormal(False)


def test_codes_do_not_approximate_latents():
    assert not made().is_approximate
    assert ResidualQuantizer(2, 3, 2).is_approximate
