"""normalise against rational arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqserve_server.search.rounding import normalise


def is_rounded_once(got: np.float32, x: float, row: list[float]) -> bool:
    """Whether x / |row| lies between the middles of a float32 and its neighbours, by signed squares."""
    square = sum((Fraction(y) ** 2 for y in row), Fraction(0))
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
