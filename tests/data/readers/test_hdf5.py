"""Files of HDF5, as h5py writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from vqserve_data.errors import FileError


@pytest.mark.parametrize("suffix", ["h5", "hdf5"])
@pytest.mark.parametrize("whole_bytes", [1 << 20, 0], ids=["in memory", "by parts"])
@pytest.mark.parametrize(
    "options",
    [{}, {"chunks": (2, 2)}, {"compression": "gzip", "shuffle": True}, {"compression": "lzf"}, {"fletcher32": True}],
)
def test_data_sets_of_h5py(
    tmp_path: Path,
    files: Any,
    same: Any,
    draw: Any,
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
    whole_bytes: int,
    options: Any,
) -> None:
    monkeypatch.setattr("vqserve_data.readers.hdf5.WHOLE_BYTES", whole_bytes)
    arrays = {
        f"x/{name}": draw(5, 4, dtype=dtype)
        for name, dtype in (("a", "f4"), ("g/b", "f2"), ("g/c/d", "i8"), ("z", ">f8"))
    }
    with h5py.File(tmp_path / f"x.{suffix}", "w") as file:
        for key, array in arrays.items():
            file.create_dataset(key.removeprefix("x/"), data=array, **options)
        file["g"].attrs["note"] = "text"
    same(files(tmp_path).arrays(), arrays)
    np.testing.assert_array_equal(files(tmp_path).read()[0].array[1:3, 2:], arrays["x/a"][1:3, 2:])


def test_what_is_no_array_of_numbers_is_bad(tmp_path: Path, files: Any, draw: Any) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["text"] = ["a", "b"]
        file["empty"] = h5py.Empty("f4")
        file["complex"] = np.zeros(2, complex)
        file.create_dataset("ragged", (2,), h5py.vlen_dtype(np.float32))
        file["good"] = draw(2)
        file["scalar"] = np.float32(2)
        file["no rows"] = np.zeros((0, 4), np.float32)
    reasons = files(tmp_path).bad()
    assert list(reasons) == ["x/complex", "x/empty", "x/ragged", "x/text"]
    assert "not numbers" in reasons["x/text"]
    assert "no array" in reasons["x/empty"]
    assert list(files(tmp_path, members=("good", "scalar", "no*")).arrays()) == ["x/good", "x/no rows", "x/scalar"]


def test_numbers_in_other_files_are_not_read(tmp_path: Path, files: Any) -> None:
    (tmp_path / "secret").write_bytes(bytes(80))
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = np.zeros(10)
    layout = h5py.VirtualLayout((10,), np.float64)
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", (10,))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("raw", (10,), "f8", external=[(str(tmp_path / "secret"), 0, 80)])
        file.create_virtual_dataset("virtual", layout)
        file["link"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "x")
        file["soft"] = h5py.SoftLink("/raw")
    reasons = files(tmp_path / "x.h5").bad()
    assert set(reasons) == {"x/raw", "x/virtual"}
    assert all("in other files" in reason for reason in reasons.values())


def test_what_was_never_written_is_bad(tmp_path: Path, files: Any) -> None:
    """A kilobyte of HDF5 can claim any number of zeros."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("never", (4, 4), "f4")
        file.create_dataset("huge", (1 << 40,), "f4", chunks=(1 << 10,))[0] = 1
        file.create_dataset("chunk", (1 << 29,), "f4", chunks=(1 << 29,), compression="gzip")
    reasons = files(tmp_path).bad()
    assert set(reasons) == {"x/never", "x/huge", "x/chunk"}
    assert all("incomplete" in reason for reason in reasons.values())


def test_a_large_data_set_outlives_its_generator(
    tmp_path: Path, files: Any, draw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vqserve_data.readers.hdf5.WHOLE_BYTES", 0)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["a"] = draw(20, 3)
    [item] = files(tmp_path).read()
    np.testing.assert_array_equal(item.array[15:], draw(20, 3)[15:])
    np.testing.assert_array_equal(item.array[()], draw(20, 3))


@pytest.mark.long
def test_damaged_files(tmp_path: Path, files: Any, draw: Any, damaged: Any) -> None:
    with h5py.File(tmp_path / "x.h5", "w", libver="latest") as file:
        file.create_dataset("a", data=draw(4, 4), chunks=(2, 4), compression="gzip")
        file["g/b"] = draw(3)
    with h5py.File(tmp_path / "y.h5", "w") as file:
        file["g/b"] = draw(3)
    for name in ("x.h5", "y.h5"):
        assert not any("MemoryError" in reason for reason in damaged(tmp_path / name, cuts=200, flips=1000))
    (tmp_path / "x.h5").write_bytes(b"")
    assert "x" in files(tmp_path / "x.h5").bad()
    with pytest.raises(FileError):
        files(tmp_path / "x.h5").entries()
