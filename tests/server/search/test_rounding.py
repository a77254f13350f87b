"""affine and weight_norm against rational arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqserve_server.search.exact import sum_of_products
from vqserve_server.search.quotients import round_fraction, round_to_float32
from vqserve_server.search.rounding import affine, weight_norm

F32_MAX = float(np.finfo(np.float32).max)


def oracle_round(value: Fraction) -> np.float32:
    """Nearest float32 to a rational, ties to even, by trying the neighbours of a first guess."""
    guess = np.float32(float(value)) if abs(value) < 2**127 else np.float32(F32_MAX) * (1 if value > 0 else -1)
    near = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    finite = [x for x in near if np.isfinite(x)]
    return min(finite, key=lambda x: (abs(Fraction(float(x)) - value), int(x.view(np.uint32)) & 1))


floats = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**60), max_value=2.0**60)


@given(st.lists(st.tuples(floats, floats), min_size=1, max_size=6), floats)
@settings(max_examples=300)
def test_affine_is_the_exact_value_rounded_once(pairs, bias):
    x, w = (np.array(part, np.float32) for part in zip(*pairs, strict=True))
    got = affine(torch.from_numpy(x)[None], torch.from_numpy(w)[None], torch.tensor([bias])).numpy()[0, 0]
    exact = sum((Fraction(float(a)) * Fraction(float(b)) for a, b in zip(x, w, strict=True)), Fraction(bias))
    assert got == oracle_round(exact)
    assert not (got == 0 and np.signbit(got))


@given(
    st.lists(
        st.tuples(st.floats(-1e200, 1e200, allow_subnormal=True), st.floats(-1e-170, 1e-170)), min_size=1, max_size=4
    )
)
@settings(max_examples=200)
def test_affine_of_float64_rows_and_weights_with_extreme_magnitudes(pairs):
    x, w = (np.array(part) for part in zip(*pairs, strict=True))
    got = affine(torch.from_numpy(x)[None], torch.from_numpy(w)[None], None).numpy()[0, 0]
    exact = sum((Fraction(a) * Fraction(b) for a, b in zip(x.tolist(), w.tolist(), strict=True)), Fraction(0))
    assert got == oracle_round(exact)


def test_affine_on_exact_half_way_values_rounds_to_even_or_by_the_tail():
    # 1 + 2^-24 is half-way between 1 and its successor: to even, unless a tail beyond float64 decides.
    rows = torch.tensor([[1.0, 2.0**-12, 0.0], [1.0, 2.0**-12, 2.0**-60], [1.0, 2.0**-12, -(2.0**-60)]])
    weight = torch.tensor([[1.0, 2.0**-12, 2.0**-60]])
    got = affine(rows, weight, None)[:, 0]
    assert got.tolist() == [1.0, 1.0 + 2.0**-23, 1.0]


def test_affine_overflow_is_infinite_and_the_last_half_step_is_not():
    largest = torch.tensor([[F32_MAX, 1.0]])
    below_half, half = 2.0**103 - 2.0**80, 2.0**103
    got = affine(torch.cat([largest, largest]), torch.tensor([[1.0, below_half], [1.0, half]]), None)
    assert got[0].tolist() == [F32_MAX, float("inf")]


@pytest.mark.parametrize(("n", "c", "d"), [(0, 3, 2), (3, 1, 1), (700, 64, 5), (5, 3, 4000)])
def test_affine_matches_float64_on_ordinary_numbers(n, c, d):
    g = torch.Generator().manual_seed(n + c + d)
    rows, weight, bias = (torch.randn(*s, generator=g) for s in ((n, c), (d, c), (d,)))
    got = affine(rows, weight, bias)
    assert got.shape == (n, d)
    wide = rows.double() @ weight.double().T + bias.double()
    # A value this close to float64's is the right one or, at a boundary, its neighbour; nearly all are the former.
    assert ((got - wide.float()).abs() <= wide.float().abs() * 2.0**-23).all()
    assert (got == wide.float()).float().mean() > 0.999 if n else True


def test_affine_row_by_row_equals_the_batch():
    g = torch.Generator().manual_seed(1)
    rows, weight, bias = (torch.randn(*s, generator=g).bfloat16().float() for s in ((200, 48), (7, 48), (7,)))
    batch = affine(rows, weight, bias)
    assert torch.equal(batch, torch.cat([affine(row[None], weight, bias) for row in rows]))


@given(st.fractions(min_value=Fraction(-(2**40)), max_value=2**40))
@settings(max_examples=200)
def test_round_fraction(value):
    assert round_fraction(value) == oracle_round(value)


@pytest.mark.parametrize("sign", [1, -1])
def test_round_fraction_at_the_ends_of_the_range(sign):
    half_above_max = Fraction(F32_MAX) + Fraction(2) ** 103
    assert round_fraction(sign * half_above_max) == sign * np.inf
    assert round_fraction(sign * (half_above_max - Fraction(1, 10**30))) == np.float32(sign * F32_MAX)
    assert round_fraction(sign * Fraction(10) ** 400) == sign * np.inf
    half_smallest = Fraction(1, 2**150)
    assert round_fraction(sign * half_smallest) == 0
    assert round_fraction(sign * (half_smallest + Fraction(1, 2**400))) == np.float32(sign * 2.0**-149)


def test_round_to_float32_uses_the_tail_only_at_ties():
    tie = 1.0 + 2.0**-24
    hi = np.array([tie, tie, tie, 1.0, 1.5])
    lo = np.array([0.0, 2.0**-80, -(2.0**-80), 2.0**-60, -(2.0**-60)])
    assert round_to_float32(hi, lo).tolist() == [1.0, 1.0 + 2.0**-23, 1.0, 1.0, 1.5]


@given(st.lists(st.tuples(st.floats(-1e150, 1e150), st.floats(-1e150, 1e150)), min_size=1, max_size=8))
@settings(max_examples=300)
def test_sum_of_products_keeps_its_bound(pairs):
    x, y = (np.array([part]) for part in zip(*pairs, strict=True))
    value = sum_of_products(x, y, exact_products=False)
    exact = sum((Fraction(a) * Fraction(b) for a, b in pairs), Fraction(0))
    if np.isfinite(value.error[0]):
        assert abs(Fraction(value.hi[0]) + Fraction(value.lo[0]) - exact) <= Fraction(value.error[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e15])
def test_weight_norm_is_rounded_once(dtype, scale):
    g = torch.Generator().manual_seed(3)
    v = torch.randn(9, 4, generator=g, dtype=dtype) * scale
    v[:, 3] = torch.tensor([3.0, 4.0] + [0.0] * 7, dtype=dtype)  # a perfect square: quotients may be exact
    gains = torch.tensor([[0.3, -1.7, 0.0, 5.0]], dtype=dtype)
    got = weight_norm(v, gains).numpy()
    for j in range(4):
        square = sum(Fraction(x) ** 2 for x in v[:, j].tolist())
        for k in range(9):
            numerator = Fraction(gains[0, j].item()) * Fraction(v[k, j].item())
            # Got is right if the exact quotient lies between the middles of it and its neighbours.
            below, above = np.nextafter(got[k, j], -np.inf), np.nextafter(got[k, j], np.inf)
            for edge, is_below in ((below, True), (above, False)):
                middle = (Fraction(float(edge)) + Fraction(float(got[k, j]))) / 2
                # The sign of quotient - middle, by signed squares.
                signed = (numerator**2 if numerator > 0 else -(numerator**2)) - (
                    middle**2 * square if middle > 0 else -(middle**2) * square
                )
                assert signed >= 0 if is_below else signed <= 0


def test_weight_norm_of_a_zero_column_is_nan_and_of_a_perfect_square_exact():
    v = torch.zeros(2, 2)
    v[:, 1] = torch.tensor([3.0, 4.0])
    got = weight_norm(v, torch.tensor([[1.0, 5.0]]))
    assert got[:, 0].isnan().all()
    assert got[:, 1].tolist() == [3.0, 4.0]
