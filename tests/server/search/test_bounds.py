"""The bounds of numpy arrays are those of tensors, and hold in exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vqserve_server.search import Objective
from vqserve_server.search.bounds import ScoreBounds, gamma, norms_above

FLOAT32S = st.floats(width=32, allow_nan=False, allow_infinity=False)
SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 12))
CODES = SHAPES.flatmap(lambda shape: arrays(np.float32, shape, elements=FLOAT32S))
TYPES = [(np.float32, torch.float32), (np.float64, torch.float64)]


def of_both(codes, bias, objective, types):
    tensors = torch.from_numpy(codes), None if bias is None else torch.from_numpy(bias)
    return ScoreBounds.of(codes, bias, objective, types[0]), ScoreBounds.of(*tensors, objective, types[1])


def assert_the_same(ours, theirs, dim):
    # numpy and torch add a row's squares in different orders, so that float64 sums differ in their last bits; each is
    # within its own bound, which is what the search needs. In float32 the difference is at most one rounding.
    relative = 2 * gamma(2 * dim + 24, np.float64) + (2.0**-23 if ours.offset.dtype == np.float32 else 0.0)
    for name in ("offset", "slope", "base"):
        got, wanted = getattr(ours, name).astype(np.float64), getattr(theirs, name).double().numpy()
        difference = np.abs(np.subtract(got, wanted, where=got != wanted, out=np.zeros_like(got)))
        assert (difference <= relative * np.abs(wanted) + 2.0**-149).all()
    assert ours.longest_row == pytest.approx(theirs.longest_row, rel=1e-12)


@pytest.mark.parametrize("types", TYPES)
@settings(max_examples=100, deadline=None)
@given(codes=CODES, data=st.data())
def test_numpy_and_torch_agree(types, codes, data):
    with np.errstate(over="ignore"):
        assert_the_same(*of_both(codes, None, Objective.L2, types), codes.shape[1])
        bias = data.draw(st.none() | arrays(np.float32, len(codes), elements=FLOAT32S))
        assert_the_same(*of_both(codes, bias, Objective.DOT, types), codes.shape[1])


@settings(max_examples=200, deadline=None)
@given(codes=CODES)
def test_norms_are_not_below_the_exact_ones(codes):
    for vectors in (codes, codes.astype(np.float64)):
        for code, bound in zip(codes.tolist(), norms_above(vectors).tolist(), strict=True):
            assert Fraction(bound) ** 2 >= sum(Fraction(x) ** 2 for x in code)
