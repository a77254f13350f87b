"""Copies between layouts, against numpy's own transpose; conversions, against exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqserve.dtypes import BFLOAT16
from vqserve.layout import Layout
from vqserve_server.engine.copy import first_overflow, read_rows, write_rows

FIRST, LAST = Layout.CHANNELS_FIRST, Layout.CHANNELS_LAST


def as_rows(latents: np.ndarray, layout: Layout) -> np.ndarray:
    moved = np.moveaxis(latents, 1, -1) if layout is FIRST else latents
    return moved.reshape(-1, moved.shape[-1])


@given(
    shape=st.lists(st.integers(1, 5), min_size=3, max_size=5),
    layout=st.sampled_from(list(Layout)),
    dtype=st.sampled_from(["<f2", "<f4", "<f8"]),
    data=st.data(),
)
def test_any_part_of_any_layout_both_ways(shape: list[int], layout: Layout, dtype: str, data: st.DataObject) -> None:
    latents = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    rows = as_rows(latents, layout)
    start = data.draw(st.integers(0, len(rows) - 1))
    stop = data.draw(st.integers(start + 1, len(rows)))
    wide = np.float64 if dtype == "<f8" else np.float32
    into = np.empty((stop - start, rows.shape[1]), wide)
    read_rows(latents, layout, start, stop, into)
    np.testing.assert_array_equal(into, rows[start:stop].astype(wide))

    back = np.zeros_like(latents)
    write_rows(into, back, layout, start)
    expected = np.zeros_like(rows)
    expected[start:stop] = rows[start:stop]
    np.testing.assert_array_equal(as_rows(back, layout), expected)


def test_bfloat16_is_widened_and_rounded() -> None:
    values = np.random.default_rng(1).standard_normal((3, 4, 5)).astype(np.float32)
    bits = BFLOAT16.narrow(values)
    into = np.empty((15, 4), np.float32)
    read_rows(bits, FIRST, 0, 15, into)
    np.testing.assert_array_equal(into, as_rows(BFLOAT16.widen(bits), FIRST))
    back = np.zeros_like(bits)
    write_rows(as_rows(values, FIRST), back, FIRST, 0)
    np.testing.assert_array_equal(back, bits)


def nearest_bfloat16(value: float) -> float:
    """The nearest bfloat16, ties to even, by comparing all neighbours exactly."""
    near = int(BFLOAT16.narrow(np.array([value], np.float32))[0])
    candidates = [bits for bits in range(near - 2, near + 3) if 0 <= bits <= 0xFFFF]
    widened = BFLOAT16.widen(np.array(candidates, np.uint16))
    exact = Fraction(value)
    pairs = [
        (abs(Fraction(float(wide)) - exact), bits & 1, float(wide))
        for bits, wide in zip(candidates, widened, strict=True)
        if np.isfinite(wide)
    ]
    return min(pairs)[2]


@given(st.floats(width=64, min_value=-1e38, max_value=1e38))
def test_float64_becomes_bfloat16_by_one_rounding(value: float) -> None:
    out = np.empty((1, 1), np.uint16)
    write_rows(np.array([[value]]), out, LAST, 0)
    assert float(BFLOAT16.widen(out)[0, 0]) == nearest_bfloat16(value)


def test_a_value_that_two_roundings_get_wrong() -> None:
    # Just above the middle of two bfloat16 numbers, by less than float32 sees: through float32 it would be a tie.
    value = 1 + 2.0**-8 + 2.0**-40
    out = np.empty((1, 1), np.uint16)
    write_rows(np.array([[value]]), out, LAST, 0)
    assert float(BFLOAT16.widen(out)[0, 0]) == 1 + 2.0**-7


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [("<f2", 65519.99), ("<u2", float.fromhex("0x1.fefffep127")), ("<f4", float.fromhex("0x1.fffffefp127"))],
)
def test_overflow_is_named_exactly_where_rounding_overflows(dtype: str, largest: float) -> None:
    rows = np.array([[0.0, -largest], [np.nextafter(largest, np.inf), 1.0]])
    assert first_overflow(rows, np.dtype(dtype)) is None
    out = np.empty((2, 2), dtype)
    write_rows(rows, out, LAST, 0)
    assert np.isfinite(BFLOAT16.widen(out) if dtype == "<u2" else out).all()
    limit = {"<f2": 65520.0, "<u2": float.fromhex("0x1.ffp127"), "<f4": float.fromhex("0x1.ffffffp127")}[dtype]
    assert first_overflow(np.array([[0.0, 0.0], [-limit, 0.0]]), np.dtype(dtype)) == 1
