"""Percentiles in bins, against sorted values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqserve_tools.inspection.error import Spread


@given(
    values=st.lists(st.one_of(st.just(0.0), st.floats(1e-30, 1e30), st.floats(0.5, 1.5)), min_size=1, max_size=50),
    percent=st.sampled_from([1, 50, 90, 99, 100]),
)
def test_percentiles_are_within_a_bin(values, percent):
    spread = Spread()
    for part in (values[:20], values[20:]):
        spread.add(np.array(part))
    exact = np.percentile(values, percent, method="inverted_cdf")
    assert spread.percentile(percent) == pytest.approx(exact, rel=2**-14)
    assert spread.max == max(values)
    bins, counts = spread.values_and_counts()
    assert counts.sum() == len(values)
    np.testing.assert_allclose(np.repeat(bins, counts), np.sort(values), rtol=2**-14)


def test_values_beyond_float32_are_its_largest():
    spread = Spread()
    spread.add(np.array([1.0, 1e300]))
    assert spread.max == 1e300
    assert spread.percentile(99) == pytest.approx(float(np.finfo(np.float32).max), rel=2**-14)
