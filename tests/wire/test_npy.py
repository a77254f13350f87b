"""Arrays of .npy files, read part by part: the same values as numpy's, and an error where the file is cut short."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

from vqserve import npy
from vqserve.npy import NpyFile, TruncatedFile


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("npy") / "array.npy"


def saved(path: Path, array: np.ndarray) -> NpyFile:
    np.save(path, array)
    return NpyFile(path)


ARRAYS = numpy_strategies.arrays(
    st.sampled_from(["<f4", ">f4", "f8", "f2", "u1", "<i8", "?"]),
    numpy_strategies.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=6),
    elements=st.integers(0, 1),
)


@given(data=st.data(), array=ARRAYS, fortran=st.booleans(), scratch=st.sampled_from([1, 64, 1 << 22]))
def test_a_part_is_the_one_that_numpy_gives(
    path: Path, data: st.DataObject, array: np.ndarray, *, fortran: bool, scratch: int
) -> None:
    values = np.arange(array.size).reshape(array.shape).astype(array.dtype)
    file = saved(path, np.array(values, order="F" if fortran else "C"))
    assert (file.shape, file.dtype, file.ndim, file.size) == (values.shape, values.dtype, values.ndim, values.size)
    bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in values.shape]
    cut = tuple(slice(*each) for each in bounds)[: data.draw(st.integers(0, values.ndim))]
    before, npy._SCRATCH_BYTES = npy._SCRATCH_BYTES, scratch
    try:
        part = file[cut]
    finally:
        npy._SCRATCH_BYTES = before
    assert part.dtype == values.dtype
    np.testing.assert_array_equal(part, values[cut])
    if values.ndim and len(values):
        positions = np.array(data.draw(st.lists(st.integers(0, len(values) - 1), max_size=20)), np.int64)
        np.testing.assert_array_equal(file.items(positions), values[positions])


def test_reads_of_a_large_array_are_few(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call for a contiguous part, one for each channel of an image's rows, one for a block of small items."""
    values = np.arange(4 * 8 * 64 * 64, dtype=np.float32).reshape(4, 8, 64, 64)
    file = saved(path, values)
    calls: list[int] = []
    preadv = os.preadv

    def counted(fd: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(len(buffers[0]))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    np.testing.assert_array_equal(file[1:3], values[1:3])
    assert calls == [2 * 8 * 64 * 64 * 4]
    calls.clear()
    np.testing.assert_array_equal(file[1:2, :, 16:48], values[1:2, :, 16:48])
    # Half of each channel: to read all of the image is quicker than eight calls.
    assert sum(calls) <= 8 * 64 * 64 * 4
    calls.clear()
    np.testing.assert_array_equal(file[:, :, :, :1], values[:, :, :, :1])
    assert len(calls) < 64


@pytest.mark.parametrize("fortran", [False, True])
def test_a_file_that_is_truncated_while_it_is_read(tmp_path: Path, *, fortran: bool) -> None:
    values = np.zeros((64, 64, 64), np.float32, order="F" if fortran else "C")
    file = saved(tmp_path / "z.npy", values)
    os.truncate(tmp_path / "z.npy", 1 << 16)
    text = f"{tmp_path / 'z.npy'} was truncated while it was read"
    for read in (lambda: file[()], lambda: file[:, 60:, 60:], lambda: file.items(np.array([60, 3]))):
        with pytest.raises(TruncatedFile, match=text):
            read()
    assert file[:0].shape == (0, 64, 64)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "it is empty"),
        (b"PK", "does not begin as a .npy file"),
        (b"\x93NUMPY\x03\x00\x10\x00\x00\x00", r"version 3\.0 of the \.npy format is not read"),
        (b"\x93NUMPY\x01\x00\x10\x00nonsense        ", "."),
    ],
)
def test_what_is_no_npy_file(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "z.npy").write_bytes(content)
    with pytest.raises(ValueError, match=text):
        NpyFile(tmp_path / "z.npy")


def test_objects_and_incomplete_files_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        NpyFile(tmp_path / "objects.npy")
    np.save(tmp_path / "half.npy", np.zeros(100))
    os.truncate(tmp_path / "half.npy", 500)
    with pytest.raises(ValueError, match="needs 800 bytes and it has 372: it is incomplete"):
        NpyFile(tmp_path / "half.npy")
    with (tmp_path / "negative.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (-1, 4)})
    with pytest.raises(ValueError, match="incomplete"):
        NpyFile(tmp_path / "negative.npy")


def test_its_descriptor_is_closed(tmp_path: Path) -> None:
    np.save(tmp_path / "z.npy", np.zeros(10))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(10):
        assert NpyFile(tmp_path / "z.npy")[:1].shape == (1,)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
