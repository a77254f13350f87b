"""FSQ and LFQ: digits as the formula gives them in exact arithmetic, also next to where it jumps."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support import exact
from vqserve_server.errors import CodebookError, IndexOutOfRange, InvalidOption, InvalidShape, NonFiniteLatents
from vqserve_server.quantizers import FiniteScalarQuantizer, LookupFreeQuantizer, freeze
from vqserve_server.quantizers.fsq_boundaries import boundaries

FAST = settings(max_examples=150, derandomize=True, database=None)
BOUNDS = ("atanh", "tan", "symmetric")
COSMOS = (8, 8, 8, 5, 5, 5)


def digit(z: float, level: int, bound: str) -> int:
    """The formula, evaluated by mpmath, within the level's digits."""
    if bound == "symmetric":
        # floor((L - 1)(tanh(z) + 1) / 2 + 1/2), without a sum that would lose the last bits of a small z.
        return sum(mpmath.tanh(mpmath.mpf(z)) >= mpmath.mpf(2 * d - level) / (level - 1) for d in range(1, level))
    eps = mpmath.mpf(1) / 1000 if bound == "atanh" else -mpmath.mpf(1) / 1000
    half, offset = (level - 1) * (1 + eps) / 2, mpmath.mpf(1 - level % 2) / 2
    shift = (mpmath.atanh if bound == "atanh" else mpmath.tan)(offset / half)
    value = mpmath.tanh(mpmath.mpf(z) + shift) * half - offset
    return min(max(int(mpmath.nint(value)) + level // 2, 0), level - 1)


def value(digit: int, level: int, bound: str) -> Fraction:
    """What a digit is decoded as."""
    return Fraction(2 * digit, level - 1) - 1 if bound == "symmetric" else Fraction(digit - level // 2, level // 2)


def neighbours(number: float, dtype: type) -> list[float]:
    """The numbers of a type around a real one."""
    near = dtype(number)
    return [float(x) for x in (np.nextafter(near, dtype(-np.inf)), near, np.nextafter(near, dtype(np.inf)))]


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("level", [2, 3, 4, 5, 6, 7, 8, 11, 16, 17])
def test_boundaries_are_where_the_formula_jumps(level, bound):
    quantizer = FiniteScalarQuantizer([level], bound)
    for dtype in (np.float32, np.float64):
        near = [z for edge in boundaries(level, bound) for z in neighbours(edge, dtype)]
        z = np.array([*near, *neighbours(0.0, dtype), -1e30, 1e30], dtype)[:, None]
        expected = [digit(float(x), level, bound) for x in z[:, 0]]
        assert quantizer.encode(torch.from_numpy(z)).tolist() == expected
        assert set(expected) == set(range(level))


@pytest.mark.parametrize("bound", BOUNDS)
@given(
    levels=st.lists(st.integers(2, 40), min_size=1, max_size=5),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-6, 0.3, 1.0, 4.0]),
    double=st.booleans(),
)
@settings(FAST, max_examples=40)
def test_any_latents(bound, levels, seed, scale, double):
    dtype = torch.float64 if double else torch.float32
    z = torch.randn(6, len(levels), generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale
    digits = [[digit(x, level, bound) for x, level in zip(row, levels, strict=True)] for row in z.tolist()]
    expected = [sum(d * math.prod(levels[:i]) for i, d in enumerate(row)) for row in digits]
    quantizer = FiniteScalarQuantizer(levels, bound)
    assert quantizer.encode(z).tolist() == expected
    assert [int(quantizer.encode(row[None])) for row in z] == expected
    values = [[value(d, n, bound) for d, n in zip(row, levels, strict=True)] for row in digits]
    assert quantizer.decode(torch.tensor(expected)).tolist() == [
        [float(exact.round32(x)) for x in row] for row in values
    ]


def test_what_float32_gives_away_from_the_jumps():
    # The original's own arithmetic, in float32.
    levels = torch.tensor(COSMOS)
    half = (levels - 1) * (1 + 1e-3) / 2
    offset = torch.where(levels % 2 == 0, 0.5, 0.0)
    z = torch.randn(20000, 6, generator=torch.Generator().manual_seed(0)) * 1.5
    bounded = (z + (offset / half).atanh()).tanh() * half - offset
    clear = ((bounded - bounded.floor() - 0.5).abs() > 1e-4).all(dim=1)
    basis = torch.tensor([1, 8, 64, 512, 2560, 12800])
    expected = ((bounded.round().to(torch.int64) + levels // 2) * basis).sum(dim=1)
    quantizer = FiniteScalarQuantizer(COSMOS)
    assert clear.float().mean() > 0.99
    assert torch.equal(quantizer.encode(z)[clear], expected[clear])
    assert torch.equal(quantizer.decode(expected), bounded.round() / (levels // 2))
    assert quantizer.num_codes == 64000


@pytest.mark.parametrize("levels", [(2,), (3, 2), (8, 5, 5), (2, 3, 4, 5)])
def test_every_index_can_be_had_and_read(levels):
    quantizer = FiniteScalarQuantizer(levels)
    # A number inside each digit's interval.
    inside = []
    for level in levels:
        edges = boundaries(level, "atanh")
        inside.append([edges[0] - 1, *(edges[:-1] + edges[1:]) / 2, edges[-1] + 1])
    # The first channel counts least.
    grid = torch.tensor([tuple(reversed(row)) for row in itertools.product(*reversed(inside))])
    assert quantizer.encode(grid).tolist() == list(range(quantizer.num_codes))
    decoded = quantizer.decode(torch.arange(quantizer.num_codes))
    assert len({tuple(row) for row in decoded.tolist()}) == quantizer.num_codes
    assert decoded.abs().max() == 1


def test_more_levels_than_the_formula_can_reach():
    # (1 + eps)(L - 1) / 2 - 1/2 is more than half a step beyond the last digit: the original's index is out of range.
    quantizer = FiniteScalarQuantizer([1500])
    assert quantizer.encode(torch.tensor([[30.0], [-30.0]])).tolist() == [1499, 0]
    # With (1 - eps) the last digits are never reached.
    quantizer = FiniteScalarQuantizer([1500], "tan")
    assert quantizer.encode(torch.tensor([[300.0], [-300.0]])).tolist() == [
        digit(300, 1500, "tan"),
        digit(-300, 1500, "tan"),
    ]


@pytest.mark.parametrize(
    ("levels", "match"),
    [
        ([], "at least one"),
        ([8, 1], "integers in"),
        ([8, 0], "integers in"),
        ([8, -5], "integers in"),
        ([8, 2.5], "integers in"),
        ([8, True], "integers in"),
        ("88", "integers in"),
        ([65537], "integers in"),
        ([65536, 65536, 2], "8589934592 codes are more than an index"),
        ([2] * 33, "are more than an index"),
        ([2] * 5000, "are more than an index"),
    ],
)
def test_levels_are_checked(levels, match):
    with pytest.raises(InvalidOption, match=match):
        FiniteScalarQuantizer(levels)


def test_the_largest_vocabulary():
    quantizer = LookupFreeQuantizer(32, "big")
    assert quantizer.num_codes == quantizer.vocab_size == 1 << 32
    assert quantizer.encode(torch.ones(1, 32)).tolist() == [(1 << 32) - 1]
    assert torch.equal(quantizer.decode(torch.tensor([(1 << 32) - 1])), torch.ones(1, 32))
    with pytest.raises(IndexOutOfRange, match=r"indices\[0\] is 4294967296"):
        quantizer.decode(torch.tensor([1 << 32]))
    assert FiniteScalarQuantizer([2] * 32).num_codes == 1 << 32


def test_other_options_are_checked():
    for make, match in (
        (lambda: FiniteScalarQuantizer([3], "tanh"), "bound must be one of atanh, tan, symmetric"),
        (lambda: FiniteScalarQuantizer([3], input_dim=0), "input_dim must be a positive integer"),
        (lambda: LookupFreeQuantizer(33, "big"), "33 bits"),
        (lambda: LookupFreeQuantizer(0, "big"), "bits must be a positive"),
        (lambda: LookupFreeQuantizer(4, "middle"), "bit_order must be one of big, little"),
    ):
        with pytest.raises(InvalidOption, match=match):
            make()
    with pytest.raises(InvalidOption, match="no search backend 'faiss'"):
        freeze(LookupFreeQuantizer(3, "big"), device="cpu", search="faiss")
    with pytest.raises(InvalidOption, match="'rows'"):
        freeze(LookupFreeQuantizer(3, "big"), device="cpu").decode_rows(torch.tensor([0]), output="rows")


# Signs.


@given(
    bits=st.integers(1, 32),
    order=st.sampled_from(["big", "little"]),
    spherical=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16]),
)
@FAST
def test_bits_are_signs(bits, order, spherical, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    specials = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 6e-8, -6e-8, 3.0, -3.0])
    z = specials[torch.randint(0, 8, (9, bits), generator=generator)].to(dtype)
    places = range(bits) if order == "little" else range(bits - 1, -1, -1)
    expected = [sum((x > 0) << place for x, place in zip(row, places, strict=True)) for row in z.tolist()]
    quantizer = LookupFreeQuantizer(bits, order, spherical)
    assert quantizer.encode(z).tolist() == expected
    value = float(exact.round32(1 / mpmath.sqrt(bits))) if spherical else 1.0
    decoded = quantizer.decode(torch.tensor(expected))
    assert decoded.tolist() == [[value if x > 0 else -value for x in row] for row in z.tolist()]
    assert quantizer.encode(decoded).tolist() == expected


def test_zero_is_a_zero_bit_whatever_the_processor_does_with_small_numbers():
    quantizer = LookupFreeQuantizer(3, "big")
    try:
        torch.set_flush_denormal(True)
        assert quantizer.encode(torch.tensor([[0.0, -0.0, 1.0]])).tolist() == [1]
    finally:
        torch.set_flush_denormal(False)


def test_boundaries_hold_whatever_the_processor_does_with_small_numbers():
    """The boundary at zero of the symmetric bound is the denormal just below it."""
    for dtype in (torch.float32, torch.float64):
        z = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0], dtype=dtype)[:, None]
        for level in (2, 4, 16):
            half = level // 2
            expected = FiniteScalarQuantizer([level], "symmetric").encode(z).tolist()
            assert expected[:4] == [half, half, half, half - 1]
            try:
                torch.set_flush_denormal(True)
                assert FiniteScalarQuantizer([level], "symmetric").encode(z).tolist() == expected
            finally:
                torch.set_flush_denormal(False)


def test_the_orders_are_the_originals():
    z = torch.tensor([[1.0, -1.0, -1.0, -1.0], [1.0, 1.0, -1.0, -1.0]])
    assert LookupFreeQuantizer(4, "big").encode(z).tolist() == [8, 12]
    assert LookupFreeQuantizer(4, "little").encode(z).tolist() == [1, 3]


# The speech tokenizers of CosyVoice 2 and 3 (S3Tokenizer): round(tanh(x) * 0.999) + 1, index = sum of digits times 3^i.


def cosyvoice(x: torch.Tensor) -> torch.Tensor:
    """The original's own arithmetic, on channels."""
    digits = (x.tanh() * 0.9990000128746033).round() + 1
    return (digits * 3 ** torch.arange(8)).sum(dim=1).to(torch.int64)


def test_cosyvoice_is_fsq_with_three_levels():
    quantizer = FiniteScalarQuantizer([3] * 8, "tan", input_dim=1280)
    assert (quantizer.num_codes, quantizer.input_dim, quantizer.output_dim) == (6561, 1280, 8)
    assert sorted(quantizer.state_dict()) == ["proj_in.bias", "proj_in.weight"]
    torch.manual_seed(0)
    rows = 2 * torch.randn(2000, 1280)
    with torch.no_grad():
        quantizer.proj_in.weight.normal_(0, 1280**-0.5)
        projected = quantizer.proj_in(rows)
    indices = quantizer.encode(rows)
    differing = indices != cosyvoice(projected)
    edge = boundaries(3, "tan")[1]
    nearest = (projected.double().abs() - edge).abs().min(dim=1).values
    assert differing.sum() <= 2
    assert bool((nearest[differing] < 1e-5).all())
    # There is no decoder upstream: the digits, -1, 0 or 1.
    assert torch.equal(quantizer.decode(indices)[~differing], projected.tanh().mul(0.999).round()[~differing])


def test_cosyvoice_s_constant_is_0_999_for_every_number_of_float32():
    """Its factor is 0.999 rounded to float32: between the boundaries of the two no number of float32 lies."""
    theirs = mpmath.atanh(mpmath.mpf(1) / 2 / mpmath.mpf(0.9990000128746033))
    below, above = (
        max(mpmath.mpf(x) for x in neighbours(edge, np.float32) if x < edge)
        for edge in (theirs, mpmath.mpf(boundaries(3, "tan")[1]))
    )
    assert below == above
    assert boundaries(3, "tan").tolist() == [-np.nextafter(boundaries(3, "tan")[1], 1), boundaries(3, "tan")[1]]
    near = torch.tensor([*neighbours(float(theirs), np.float32), 0.0])
    z = torch.cat([near, -near])[:, None]
    expected = (mpmath.nint(mpmath.tanh(mpmath.mpf(x)) * mpmath.mpf(0.9990000128746033)) + 1 for x in z[:, 0].tolist())
    assert FiniteScalarQuantizer([3], "tan").encode(z).tolist() == [int(x) for x in expected]


# Projections.


@pytest.mark.parametrize(
    "make", [lambda **o: FiniteScalarQuantizer([5, 4], **o), lambda **o: LookupFreeQuantizer(2, "big", **o)]
)
@pytest.mark.parametrize("double", [False, True])
def test_projections_are_exact_on_both_sides(make, double):
    torch.manual_seed(3)
    quantizer, plain = make(input_dim=3, output_dim=6), make()
    if double:
        quantizer.double()
    rows = torch.randn(40, 3)
    inner, outer = ((layer.weight.tolist(), layer.bias.tolist()) for layer in (quantizer.proj_in, quantizer.proj_out))
    projected = torch.tensor([exact.affine(row, *inner) for row in rows.tolist()])
    indices = quantizer.encode(rows)
    assert torch.equal(indices, plain.encode(projected))
    ids = torch.arange(quantizer.num_codes)
    codes = plain.decode(ids)
    assert torch.equal(quantizer.get_codebook_entry(ids).float(), codes)
    decoded = quantizer.decode(ids)
    assert decoded.dtype == quantizer.weight_dtype == (torch.float64 if double else torch.float32)
    assert decoded.tolist() == [exact.affine(code, *outer) for code in codes.tolist()]
    assert (quantizer.input_dim, quantizer.code_dim, quantizer.output_dim) == (3, 2, 6)


def test_projections_beyond_float32_are_rejected():
    quantizer = LookupFreeQuantizer(2, "big", input_dim=2, output_dim=2)
    quantizer.proj_in.weight.data.fill_(1e10)
    z = torch.zeros(2, 2, 3, 3)
    z[1, :, 2, 0] = 1e35
    with pytest.raises(NonFiniteLatents, match=r"the projection of token \[1, 2, 0\] leaves the range of float32"):
        quantizer.encode(z)
    quantizer.proj_out.weight.data.fill_(3e38)
    with pytest.raises(CodebookError, match="beyond float32's range"):
        freeze(quantizer, device="cpu")
    quantizer.proj_out.weight.data[0, 1] = math.nan
    with pytest.raises(CodebookError, match="proj_out holds NaN"):
        freeze(quantizer, device="cpu")


def test_entries_by_shape():
    quantizer = FiniteScalarQuantizer([3, 4])
    indices = torch.arange(12)
    rows = quantizer.get_codebook_entry(indices)
    assert torch.equal(
        quantizer.get_codebook_entry(indices, (2, 2, 3, 2)), rows.reshape(2, 2, 3, 2).permute(0, 3, 1, 2)
    )
    assert torch.equal(quantizer.get_codebook_entry(indices.reshape(3, 4)), rows.reshape(3, 4, 2))
    with pytest.raises(InvalidShape, match="entries of shape"):
        quantizer.get_codebook_entry(indices, (3, 3, 2))
    with pytest.raises(IndexOutOfRange, match=r"indices\[0\] is 12"):
        quantizer.get_codebook_entry(torch.tensor([12]))
