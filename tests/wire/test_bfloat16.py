"""bfloat16 as torch has it, bit for bit."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vqserve import bfloat16

EVERY = np.arange(1 << 16, dtype=np.uint16)


def torch_bits(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def test_widen_is_exact_for_every_pattern():
    expected = torch.from_numpy(EVERY.view(np.int16)).view(torch.bfloat16).float().numpy()
    assert (bfloat16.widen(EVERY).view(np.uint32) == expected.view(np.uint32)).all()


def test_rounding_back_gives_every_pattern():
    values = bfloat16.widen(EVERY)
    again = bfloat16.round_bits(values)
    nan = np.isnan(values)
    assert (again[~nan] == EVERY[~nan]).all()
    assert np.isnan(bfloat16.widen(again[nan])).all()


def test_ties_and_their_neighbours_round_as_torchs():
    upper = EVERY.astype(np.uint32) << 16
    for lower in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (upper | np.uint32(lower)).view(np.float32)
        values = values[~np.isnan(values)]
        assert (bfloat16.round_bits(values) == torch_bits(values)).all()


@given(hnp.arrays(np.float32, st.integers(0, 50), elements=st.floats(width=32, allow_nan=False)))
def test_rounding_is_torchs(values):
    assert (bfloat16.round_bits(values) == torch_bits(values)).all()


@given(hnp.arrays(np.uint32, st.integers(1, 50)))
def test_a_nan_stays_one_whatever_its_bits(bits):
    values = (bits | np.uint32(0x7F800001)).view(np.float32)
    assert np.isnan(bfloat16.widen(bfloat16.round_bits(values))).all()


def test_any_shape_and_strides():
    values = np.linspace(-3, 3, 24, dtype=np.float32).reshape(2, 3, 4)
    for view in (values, values.T, values[:, ::2], values[:0], np.float32(1.1).reshape(())):
        bits = bfloat16.round_bits(view)
        assert bits.shape == view.shape
        assert (bits == bfloat16.round_bits(np.ascontiguousarray(view).reshape(-1)).reshape(view.shape)).all()
        assert bfloat16.widen(bits).shape == view.shape
    strided = bfloat16.round_bits(values)[:, ::2]
    assert (bfloat16.widen(strided) == bfloat16.widen(strided.copy())).all()
