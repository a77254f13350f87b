"""The table of element types: what the .proto file says, and bfloat16 as torch has it, bit for bit."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vqserve.dtypes import BFLOAT16, DTYPES, LATENT_NAMES, LATENTS, LatentDTypeName, of_torch, to_numpy, to_torch
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_server.quantizers.tensors import narrow

EVERY = np.arange(1 << 16, dtype=np.uint16)


def torch_bits(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def test_widen_is_exact_for_every_pattern():
    expected = torch.from_numpy(EVERY.view(np.int16)).view(torch.bfloat16).float().numpy()
    assert (BFLOAT16.widen(EVERY).view(np.uint32) == expected.view(np.uint32)).all()


def test_rounding_back_gives_every_pattern():
    values = BFLOAT16.widen(EVERY)
    again = BFLOAT16.narrow(values)
    nan = np.isnan(values)
    assert (again[~nan] == EVERY[~nan]).all()
    assert np.isnan(BFLOAT16.widen(again[nan])).all()


def test_ties_and_their_neighbours_round_as_torchs():
    upper = EVERY.astype(np.uint32) << 16
    for lower in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (upper | np.uint32(lower)).view(np.float32)
        values = values[~np.isnan(values)]
        assert (BFLOAT16.narrow(values) == torch_bits(values)).all()


@given(hnp.arrays(np.float32, st.integers(0, 50), elements=st.floats(width=32, allow_nan=False)))
def test_rounding_is_torchs(values):
    assert (BFLOAT16.narrow(values) == torch_bits(values)).all()


def test_float64_is_rounded_once():
    """Next to the middle of two patterns float32 would land on the middle, and the tie would go to the even one."""
    below = np.arange(0x0080, 0x7F7F, dtype=np.uint16)
    low, high = (BFLOAT16.widen(bits).astype(np.float64) for bits in (below, below + np.uint16(1)))
    middle = (low + high) / 2
    for sign, bit in ((1, 0), (-1, 0x8000)):
        assert (BFLOAT16.narrow(sign * np.nextafter(middle, 0)) == below | bit).all()
        assert (BFLOAT16.narrow(sign * np.nextafter(middle, np.inf)) == below + 1 | bit).all()
        assert (BFLOAT16.narrow(sign * middle) == below + (below & 1) | bit).all()


@given(hnp.arrays(np.uint32, st.integers(1, 50)))
def test_a_nan_stays_one_whatever_its_bits(bits):
    values = (bits | np.uint32(0x7F800001)).view(np.float32)
    assert np.isnan(BFLOAT16.widen(BFLOAT16.narrow(values))).all()


def test_any_shape_and_strides():
    values = np.linspace(-3, 3, 24, dtype=np.float32).reshape(2, 3, 4)
    for view in (values, values.T, values[:, ::2], values[:0], np.float32(1.1).reshape(())):
        bits = BFLOAT16.narrow(view)
        assert bits.shape == view.shape
        assert (bits == BFLOAT16.narrow(np.ascontiguousarray(view).reshape(-1)).reshape(view.shape)).all()
        assert BFLOAT16.widen(bits).shape == view.shape
    strided = BFLOAT16.narrow(values)[:, ::2]
    assert (BFLOAT16.widen(strided) == BFLOAT16.widen(strided.copy())).all()


def test_the_table_is_the_proto_files():
    in_proto = {name.removeprefix("DTYPE_").lower(): number for name, number in pb.DType.items()}
    assert in_proto == {"unspecified": 0} | {dtype.name: dtype.number for dtype in DTYPES}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_every_type_is_torchs_of_the_name(dtype):
    tensor = torch.zeros(3, dtype=getattr(torch, dtype.name))
    array = to_numpy(tensor)
    assert array.dtype == dtype.storage
    assert to_torch(array, dtype.name).dtype == tensor.dtype
    assert of_torch(tensor.dtype) is dtype
    assert array.ctypes.data == tensor.data_ptr() == to_torch(array, dtype.name).data_ptr()


@pytest.mark.parametrize(
    "dtype", [dtype for dtype in LATENTS if dtype.storage.itemsize < 8], ids=lambda dtype: dtype.name
)
def test_the_least_magnitude_that_overflows(dtype):
    limit = torch.tensor([dtype.overflow, np.nextafter(dtype.overflow, 0)], dtype=torch.float64)
    values = (
        limit.to(getattr(torch, dtype.name)) if dtype.name == "float32" else narrow(limit, getattr(torch, dtype.name))
    )
    assert values.isinf().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [dtype for dtype in LATENTS if dtype.exponent], ids=lambda dtype: dtype.name)
def test_the_exponent_finds_non_finite_values(dtype):
    values = to_torch(EVERY.view(dtype.storage).copy(), dtype.name)
    non_finite = (EVERY & np.uint16(dtype.exponent)) == dtype.exponent
    assert (non_finite == ~torch.isfinite(values).numpy()).all()


def test_a_name_for_people_is_a_row_of_the_table():
    assert set(get_args(LatentDTypeName)) == set(LATENT_NAMES)
