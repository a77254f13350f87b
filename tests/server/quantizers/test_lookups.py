"""Cosine and dot codebooks: the winner in exact arithmetic, and what it is decoded as."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support import exact
from vqserve_server.errors import CodebookError, InvalidOption
from vqserve_server.quantizers import CosineQuantizer, DotQuantizer, VectorQuantizer, freeze
from vqserve_server.search import available

FAST = settings(max_examples=60, derandomize=True, database=None)


@st.composite
def codebooks(draw):
    """Codes and rows: of small integers, so that exact ties, zeros and parallel codes are common, or normal."""
    num_codes, dim, rows = draw(st.integers(1, 12)), draw(st.integers(1, 5)), draw(st.integers(0, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):
        return (torch.randint(-2, 3, (n, dim), generator=generator).float() for n in (num_codes, rows))
    scales = draw(st.sampled_from([1e-30, 1.0, 1e9])), draw(st.sampled_from([1e-30, 1.0, 1e30]))
    return (torch.randn(n, dim, generator=generator) * s for n, s in zip((num_codes, rows), scales, strict=True))


def quantizer_of(cls, codes, **arguments):
    quantizer = cls(*codes.shape, **arguments)
    quantizer.embedding.weight.data = codes.clone()
    return quantizer


@given(codebook=codebooks(), backend=st.sampled_from(available("cpu")))
@FAST
def test_cosine_is_the_greatest_product_with_the_unit_rows(codebook, backend):
    codes, rows = codebook
    quantizer = quantizer_of(CosineQuantizer, codes)
    unit = [exact.unit_row(code) for code in codes.tolist()]
    expected = [exact.greatest(row, unit) for row in rows.tolist()]
    assert quantizer.encode(rows).tolist() == expected
    assert freeze(quantizer, device="cpu", search=backend).encode_rows(rows).tolist() == expected
    ids = torch.arange(len(codes))
    assert torch.equal(quantizer.decode(ids), codes)
    normalized = quantizer_of(CosineQuantizer, codes, decode_normalized=True)
    assert normalized.decode(ids).tolist() == unit
    assert normalized.get_codebook_entry(ids).tolist() == unit
    assert torch.equal(normalized.encode(rows), quantizer.encode(rows))


@given(codebook=codebooks(), backend=st.sampled_from(available("cpu")))
@FAST
def test_dot_is_the_greatest_product(codebook, backend):
    codes, rows = codebook
    quantizer = quantizer_of(DotQuantizer, codes)
    expected = [exact.greatest(row, codes.tolist()) for row in rows.tolist()]
    assert quantizer.encode(rows).tolist() == expected
    assert freeze(quantizer, device="cpu", search=backend).encode_rows(rows).tolist() == expected
    assert torch.equal(quantizer.decode(torch.arange(len(codes))), codes)


@pytest.mark.parametrize("cls", [CosineQuantizer, DotQuantizer])
def test_near_ties_are_settled(cls):
    # Codes that differ in their last bits, and rows half-way between them: float32 cannot distinguish them.
    generator = torch.Generator().manual_seed(5)
    codes = torch.randn(1, 16, generator=generator) + torch.randn(40, 16, generator=generator) * 2.0**-22
    rows = torch.randn(60, 16, generator=generator)
    quantizer = quantizer_of(cls, codes)
    searched = [exact.unit_row(code) for code in codes.tolist()] if cls is CosineQuantizer else codes.tolist()
    expected = [exact.greatest(row, searched) for row in rows.tolist()]
    assert quantizer.encode(rows).tolist() == expected
    assert quantizer.encode(rows.double()).tolist() == expected
    assert [int(quantizer.encode(row[None])) for row in rows] == expected


@pytest.mark.parametrize("cls", [CosineQuantizer, DotQuantizer])
def test_the_length_of_a_latent_decides_nothing(cls):
    quantizer = cls(64, 8)
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantizer.encode(rows * 2.0**-60), quantizer.encode(rows))
    assert torch.equal(quantizer.encode(torch.zeros(3, 8)), torch.zeros(3, dtype=torch.int64))


def test_a_code_of_zeros_scores_zero():
    quantizer = quantizer_of(CosineQuantizer, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert quantizer.encode(torch.tensor([[2.0, 1.0], [-1.0, 0.0], [0.0, 1.0]])).tolist() == [0, 1, 0]


@pytest.mark.parametrize("normalized", [False, True])
def test_a_cosine_codebook_gives_its_own_codes_back(normalized):
    codes = torch.randn(200, 8, generator=torch.Generator().manual_seed(2)) * torch.logspace(-6, 6, 200)[:, None]
    quantizer = quantizer_of(CosineQuantizer, codes, decode_normalized=normalized)
    ids = torch.arange(200)
    assert torch.equal(quantizer.encode(quantizer.decode(ids)), ids)
    # What the wrong metric would do, silently.
    assert (
        quantizer_of(VectorQuantizer, codes).encode(torch.nn.functional.normalize(codes)) != ids
    ).float().mean() > 0.5


@given(codebook=codebooks(), seed=st.integers(0, 999))
@settings(FAST, max_examples=15)
def test_projections_are_exact_on_both_sides(codebook, seed):
    codes, _ = codebook
    generator = torch.Generator().manual_seed(seed)
    quantizer = quantizer_of(CosineQuantizer, codes.clamp(-1e6, 1e6), input_dim=3, output_dim=2)
    with torch.no_grad():
        for layer in (quantizer.proj_in, quantizer.proj_out):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator))
    rows = torch.randn(9, 3, generator=generator)
    inner, outer = ((layer.weight.tolist(), layer.bias.tolist()) for layer in (quantizer.proj_in, quantizer.proj_out))
    unit = [exact.unit_row(code) for code in quantizer.embedding.weight.tolist()]
    expected = [exact.greatest(exact.affine(row, *inner), unit) for row in rows.tolist()]
    assert quantizer.encode(rows).tolist() == expected
    decoded = quantizer.decode(torch.arange(len(codes)))
    assert decoded.tolist() == [exact.affine(code, *outer) for code in quantizer.embedding.weight.tolist()]
    frozen = freeze(quantizer, device="cpu")
    assert (frozen.input_dim, frozen.code_dim, frozen.output_dim) == (3, codes.shape[1], 2)


@pytest.mark.parametrize("cls", [CosineQuantizer, DotQuantizer])
def test_a_remap_reports_positions(cls):
    torch.manual_seed(0)
    quantizer = cls(16, 4, remap=[3, 9, 1], unknown_index="extra")
    plain = cls(16, 4)
    plain.embedding.weight.data = quantizer.embedding.weight.data
    rows = torch.randn(60, 4)
    expected = [{3: 0, 9: 1, 1: 2}.get(i, 3) for i in plain.encode(rows).tolist()]
    assert quantizer.encode(rows).tolist() == expected
    assert torch.equal(quantizer.decode(torch.arange(4)), plain.decode(torch.tensor([3, 9, 1, 3])))


def test_float64_codebooks():
    codes = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for cls, normalized in ((CosineQuantizer, False), (CosineQuantizer, True), (DotQuantizer, None)):
        quantizer = cls(20, 4, **({} if normalized is None else {"decode_normalized": normalized})).double()
        quantizer.embedding.weight.data = codes
        searched = codes.tolist() if normalized is None else [exact.unit_row(code) for code in codes.tolist()]
        assert quantizer.encode(rows).tolist() == [exact.greatest(row, searched) for row in rows.tolist()]
        assert quantizer.decode(torch.tensor([0])).dtype == torch.float64
        assert quantizer.decode(torch.arange(20)).tolist() == (searched if normalized else codes.tolist())


@pytest.mark.parametrize("normalized", [False, True])
def test_entries_carry_the_codebook_s_gradient(normalized):
    quantizer = CosineQuantizer(6, 3, normalized)
    entries = quantizer.get_codebook_entry(torch.tensor([1, 4]))
    rows = quantizer.embedding.weight[[1, 4]]
    expected = torch.nn.functional.normalize(rows) if normalized else rows
    weights = torch.randn(2, 3)
    [got], [wanted] = (
        torch.autograd.grad((x * weights).sum(), quantizer.embedding.weight) for x in (entries, expected)
    )
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("cls", [CosineQuantizer, DotQuantizer])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_weights_are_rejected(cls, value):
    quantizer = cls(6, 3, input_dim=2)
    quantizer.embedding.weight.data[4, 1] = value
    for work in (lambda: quantizer.encode(torch.zeros(1, 2)), lambda: freeze(quantizer, device="cpu")):
        with pytest.raises(CodebookError, match="code 4 holds NaN or infinity"):
            work()
    quantizer.embedding.weight.data.fill_(1)
    quantizer.proj_in.bias.data[0] = value
    with pytest.raises(CodebookError, match="proj_in holds NaN or infinity"):
        freeze(quantizer, device="cpu")


@pytest.mark.parametrize("arguments", [{"n_e": 0}, {"e_dim": -1}, {"input_dim": 0}, {"output_dim": 1.5}])
def test_sizes_are_checked(arguments):
    with pytest.raises(InvalidOption, match="positive integer"):
        CosineQuantizer(**{"n_e": 3, "e_dim": 2, **arguments})
