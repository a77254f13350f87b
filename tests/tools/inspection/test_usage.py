"""How tokens are spread over codes, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqserve_tools.inspection import fit
from vqserve_tools.inspection.fit import Usage, UsageTally


def test_figures():
    counts = np.array([1, 1, 2, 3, 7, 8, 10])
    found = Usage.of(counts, 10)
    p = counts / 32
    entropy = -(p * np.log(p)).sum()
    assert (found.codes, found.used, found.dead) == (10, 7, 3)
    assert found.perplexity == pytest.approx(np.exp(entropy), rel=1e-12)
    assert found.bits == pytest.approx(entropy / np.log(2), rel=1e-12)
    assert found.share == pytest.approx(np.exp(entropy) / 10, rel=1e-12)
    assert found.largest_share == 10 / 32
    bins = [(one.least, one.most, one.codes) for one in found.histogram]
    assert bins == [(0, 0, 3), (1, 1, 2), (2, 3, 2), (4, 7, 1), (8, 15, 2)]


def test_perplexity_is_1_for_one_code_and_k_for_even_use():
    one = Usage.of(np.array([7]), 4)
    assert (one.bits, one.perplexity, str(one.bits)) == (0, 1, "0.0")
    even = Usage.of(np.array([5, 5, 5, 5]), 4)
    assert (even.bits, even.perplexity, even.share, even.dead) == (2, 4, 1, 0)


@pytest.mark.parametrize("is_dense", [True, False])
@given(pieces=st.lists(st.lists(st.integers(0, 9), max_size=20), max_size=6))
def test_tokens_are_counted_piece_by_piece(is_dense, pieces):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fit, "_MOST_PENDING", 7)
        tally = UsageTally(10 if is_dense else 1 << 32)
        for piece in pieces:
            tally.add(np.array(piece, np.int64))
        expected = np.unique([one for piece in pieces for one in piece], return_counts=True)[1]
        assert tally.counts().tolist() == expected.tolist()
        # Asking does not change it.
        assert tally.counts().tolist() == expected.tolist()
