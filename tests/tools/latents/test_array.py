"""Latents of any layout as rows, in memory or read on demand; an error if they cannot be trained on."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from vqserve_server.errors import InvalidDtype, InvalidOption, InvalidShape, NonFiniteLatents
from vqserve_tools.latents import array as array_rows
from vqserve_tools.latents.array import ArrayRows


@pytest.mark.parametrize(
    ("shape", "layout", "axis"),
    [
        ((6, 3), None, -1),
        ((2, 5, 3), None, -1),
        ((2, 3, 5), "channels_first", 1),
        ((2, 3, 4, 5), None, 1),
        ((2, 4, 5, 3), "channels_last", -1),
        ((2, 3, 2, 4, 5), None, 1),
    ],
)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("read_bytes", [None, 1, 200, 1 << 22])
def test_rows_are_tokens_in_the_order_of_the_grid(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    layout: str | None,
    axis: int,
    order: str,
    read_bytes: int | None,
) -> None:
    if read_bytes is not None:
        monkeypatch.setattr(array_rows, "_IN_MEMORY_BYTES", 0)
        monkeypatch.setattr(array_rows, "_READ_BYTES", read_bytes)
    array = np.asarray(np.random.default_rng(0).normal(size=shape), dtype=np.float32, order=order)
    np.save(tmp_path / "z.npy", array)
    rows = ArrayRows.open(tmp_path / "z.npy", layout)
    expected = np.moveaxis(array, axis, -1).reshape(-1, 3)
    assert (len(rows), rows.dim) == expected.shape
    np.testing.assert_array_equal(rows.take(np.arange(len(rows))[::-1]), expected[::-1])
    np.testing.assert_array_equal(np.concatenate(list(rows.chunks(7))), expected)
    some = np.random.default_rng(1).integers(len(rows), size=30)
    np.testing.assert_array_equal(rows.take(some), expected[some])
    assert rows.take(np.empty(0, np.int64)).shape == (0, 3)
    rows.check_finite()


@pytest.mark.parametrize("dtype", ["float16", "float64", ">f4"])
def test_rows_are_float32_of_any_float(dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    taken = ArrayRows(array).take(np.array([1, 0]))
    assert taken.dtype == np.float32
    np.testing.assert_array_equal(taken, array[::-1].astype(np.float32))


@pytest.mark.parametrize("dtype", ["int32", "complex64", "bool", "longdouble"])
def test_other_elements_are_rejected(dtype: str) -> None:
    with pytest.raises(InvalidDtype, match="float16, float32 or float64"):
        ArrayRows(np.zeros((2, 3), dtype))


@pytest.mark.parametrize("shape", [(), (4,), (1, 2, 3, 4, 5, 6), (4, 0)])
def test_other_shapes_are_rejected(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidShape):
        ArrayRows(np.zeros(shape, np.float32))


def test_layouts_are_checked() -> None:
    with pytest.raises(InvalidOption, match="layout must be one of"):
        ArrayRows(np.zeros((2, 3), np.float32), "nchw")
    with pytest.raises(InvalidShape, match="channels_first needs"):
        ArrayRows(np.zeros((2, 3), np.float32), "channels_first")


@pytest.mark.parametrize(
    ("dtype", "value", "text"),
    [("float32", np.nan, "is nan"), ("float16", -np.inf, "is -inf"), ("float64", 1e300, "beyond float32's range")],
)
def test_the_first_bad_value_is_named_by_its_place_in_the_array(
    monkeypatch: pytest.MonkeyPatch, dtype: str, value: float, text: str
) -> None:
    monkeypatch.setattr("vqserve_tools.latents.array._CHUNK_BYTES", 200)
    array = np.zeros((7, 3, 2, 5), dtype)
    rows = ArrayRows(array)
    rows.check_finite()
    array[4, 2, 1, 3] = array[6, 0, 0, 0] = value
    with pytest.raises(NonFiniteLatents, match=rf"latents\[4, 2, 1, 3\] is .*{text.removeprefix('is ')}") as caught:
        rows.check_finite()
    assert caught.value.advice() == (
        "scale the latents down" if value == 1e300 else "no code stands for it, find out where it comes from"
    )


@pytest.mark.timeout(20)
def test_a_pipe_is_rejected_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "z.npy")
    for path in (tmp_path, tmp_path / "z.npy"):
        with pytest.raises(InvalidOption, match=r"it is (a folder|no regular file): name a .npy file"):
            ArrayRows.open(path)


def test_files_that_hold_no_latents_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "z.npy"
    for content in (b"", b"hello", b"\x93NUMPY\x01\x00"):
        path.write_bytes(content)
        with pytest.raises(InvalidOption, match=r"z\.npy: it is not a \.npy file"):
            ArrayRows.open(path)
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InvalidOption, match="Python objects"):
        ArrayRows.open(path)
    np.save(path, np.zeros((8, 2), np.float32))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InvalidOption):
        ArrayRows.open(path)


def test_an_empty_array_has_no_rows(tmp_path: Path) -> None:
    rows = ArrayRows(np.zeros((0, 3), np.float32))
    rows.check_finite()
    assert len(rows) == 0


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_a_file_that_is_truncated_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setattr(array_rows, "_IN_MEMORY_BYTES", 0)
    path = tmp_path / "z.npy"
    np.save(path, np.zeros((64, 64, 64), np.float32))
    rows = ArrayRows.open(path, layout)
    os.truncate(path, 1 << 14)
    for read in (rows.check_finite, lambda: rows.take(np.array([4095, 0])), lambda: list(rows.chunks(100))):
        with pytest.raises(OSError, match="was truncated while it was read"):
            read()
