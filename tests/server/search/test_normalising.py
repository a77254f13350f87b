"""normalise against rational arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqserve_server.search.rounding import normalise


def is_rounded_once(got: np.float32, x: float, row: list[float], least: float = 0.0) -> bool:
    """Whether x / max(|row|, least) lies between the middles of a float32 and its neighbours, by signed squares."""
    square = max(sum((Fraction(y) ** 2 for y in row), Fraction(0)), Fraction(least) ** 2)
    below, above = (np.nextafter(got, np.float32(end)) for end in (-np.inf, np.inf))

    def signed(value: Fraction) -> Fraction:
        return value * abs(value)

    low, high = ((Fraction(float(got)) + Fraction(float(side))) / 2 for side in (below, above))
    return signed(low) * square <= signed(Fraction(x)) <= signed(high) * square


floats = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)
doubles = st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=True)


@given(st.lists(floats, min_size=1, max_size=7))
@settings(max_examples=300)
def test_every_element_is_the_exact_quotient_rounded_once(row):
    got = normalise(torch.tensor([row])).numpy()[0]
    if not any(row):
        assert (got == 0).all()
    else:
        assert all(is_rounded_once(value, x, row) for value, x in zip(got, row, strict=True))
    assert not np.signbit(got[got == 0]).any()


@given(st.lists(doubles, min_size=1, max_size=4))
@settings(max_examples=300)
def test_float64_rows_of_any_magnitude(row):
    got = normalise(torch.tensor([row], dtype=torch.float64)).numpy()[0]
    if any(row):
        assert all(is_rounded_once(value, x, row) for value, x in zip(got, row, strict=True))


@given(st.lists(st.integers(-8, 8), min_size=1, max_size=6), st.integers(-30, 30), st.booleans())
@settings(max_examples=300)
def test_rows_near_the_least_length(digits, exponent, is_wide):
    least = float(np.float32(1e-12))
    row = [digit * least / 8 * 2.0**exponent for digit in digits]
    dtype = torch.float64 if is_wide else torch.float32
    got = normalise(torch.tensor([row], dtype=dtype), least).numpy()[0]
    assert all(is_rounded_once(value, x, row, least) for value, x in zip(got, row, strict=True))
    if not any(row):
        assert (got == 0).all()


@given(st.lists(doubles, min_size=1, max_size=4))
@settings(max_examples=300)
def test_the_least_length_beside_numbers_of_any_magnitude(row):
    least = float(np.float32(1e-12))
    got = normalise(torch.tensor([row], dtype=torch.float64), least).numpy()[0]
    assert all(is_rounded_once(value, x, row, least) for value, x in zip(got, row, strict=True))


def test_long_rows_and_torch_s_least_length():
    rows = torch.randn(40, 3000, generator=torch.Generator().manual_seed(1))
    for scale in (1.0, 1e-13, 1e-12, 1e20):
        got = normalise(rows * scale, float(np.float32(1e-12)))
        wide = (rows * scale).double().numpy()
        wanted = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), float(np.float32(1e-12)))
        np.testing.assert_array_max_ulp(got.numpy(), wanted.astype(np.float32), 1)
        if scale <= 1.0:
            # Beyond, torch's squares overflow.
            theirs = torch.nn.functional.normalize(rows * scale, dim=-1)
            assert ((got - theirs).abs() <= 2.0**-20 * theirs.abs()).all()


@pytest.mark.parametrize("scale", [1.0, 2.0**-140, 2.0**100])
def test_rows_whose_elements_lie_near_a_rounding_boundary(scale):
    # Elements next to the middle of two float32 numbers, of a row whose norm is nearly one: float64 cannot decide.
    middle = 0.5 + 2.0**-25
    rest = np.sqrt(1 - middle**2)
    rows = np.array([[middle * (1 + side * 2.0**-53), rest] for side in range(-3, 4)]) * scale
    got = normalise(torch.from_numpy(rows)).numpy()
    for row, values in zip(rows.tolist(), got, strict=True):
        assert all(is_rounded_once(value, x, row) for value, x in zip(values, row, strict=True))


def test_a_power_of_two_changes_nothing_and_neither_does_the_batch():
    rows = torch.randn(500, 33, generator=torch.Generator().manual_seed(0))
    got = normalise(rows)
    assert torch.equal(got, normalise(rows * 2.0**-90))
    assert torch.equal(got, torch.cat([normalise(row[None]) for row in rows]))
    assert torch.equal(normalise(torch.zeros(0, 3)), torch.zeros(0, 3))
    assert ((got - torch.nn.functional.normalize(rows)).abs() <= 2.0**-23).all()


def test_unit_rows_stay_as_they_are():
    assert torch.equal(normalise(torch.eye(5) * 7.3), torch.eye(5))
    assert normalise(torch.tensor([[3.0, -4.0]])).tolist() == torch.tensor([[0.6, -0.8]]).tolist()
