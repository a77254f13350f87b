"""Stores of Zarr, as zarr writes them in both formats."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr

from vqserve_data.errors import FileError

FORMATS = pytest.mark.parametrize("zarr_format", [2, 3])


@FORMATS
@pytest.mark.parametrize("whole_bytes", [1 << 20, 0], ids=["in memory", "by parts"])
def test_groups_of_zarr(
    tmp_path: Path,
    files: Any,
    same: Any,
    draw: Any,
    monkeypatch: pytest.MonkeyPatch,
    zarr_format: int,
    whole_bytes: int,
) -> None:
    monkeypatch.setattr("vqserve_data.readers.zarr.WHOLE_BYTES", whole_bytes)
    arrays = {
        name: draw(5, 6, dtype=dtype) for name, dtype in (("a", "f4"), ("g/b", "f2"), ("g/h/c", "i8"), ("z", ">f8"))
    }
    root = zarr.open_group(tmp_path / "s.zarr", mode="w", zarr_format=zarr_format)
    for name, array in reversed(arrays.items()):
        options = {"shards": (4, 4)} if zarr_format == 3 and name == "a" else {}
        root.create_array(name, shape=array.shape, dtype=array.dtype, chunks=(2, 2), **options)[:] = array
    found = files(tmp_path).arrays()
    same(found, {f"s/{name}": array.astype(found[f"s/{name}"].dtype) for name, array in arrays.items()})
    np.testing.assert_array_equal(files(tmp_path).read()[0].array[1:3, 2:], arrays["a"][1:3, 2:])
    assert list(files(tmp_path / "s.zarr", members=("g/*",)).arrays()) == ["s/g/b", "s/g/h/c"]


@FORMATS
def test_one_array(tmp_path: Path, files: Any, same: Any, draw: Any, zarr_format: int) -> None:
    array = draw(5, 6)
    zarr.save_array(tmp_path / "d" / "s.zarr", array, zarr_format=zarr_format)
    same(files(tmp_path).arrays(), {"d/s": array})
    same(files(tmp_path / "d" / "s.zarr", members=("x",)).arrays(), {"s": array})


@pytest.mark.parametrize("compressor", ["auto", "blosc"])
@FORMATS
def test_a_damaged_chunk_leaves_the_other_arrays(
    tmp_path: Path, files: Any, draw: Any, zarr_format: int, compressor: Any
) -> None:
    if compressor == "blosc":
        compressor = numcodecs.Blosc() if zarr_format == 2 else zarr.codecs.BloscCodec()
    root = zarr.open_group(tmp_path / "s.zarr", mode="w", zarr_format=zarr_format)
    for name in "abc":
        root.create_array(name, data=draw(8, 8), compressors=compressor)
    chunk = tmp_path / "s.zarr" / "b" / ("0.0" if zarr_format == 2 else "c/0/0")
    chunk.write_bytes(chunk.read_bytes()[:-9])
    records = files(tmp_path).read()
    assert [record.key for record in records] == ["s/a", "s/b", "s/c"]
    assert list(files(tmp_path).bad()) == ["s/b"]


@pytest.mark.parametrize("content", [{}, {"zarr.json": "{"}, {"zarr.json": '{"zarr_format": 3}'}, {".zarray": "[]"}])
def test_what_is_no_store_is_bad(tmp_path: Path, files: Any, content: dict[str, str]) -> None:
    (tmp_path / "s.zarr").mkdir()
    for name, text in content.items():
        (tmp_path / "s.zarr" / name).write_text(text)
    assert list(files(tmp_path).bad()) == ["s"]
    with pytest.raises(FileError):
        files(tmp_path).entries()


class Evil:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('a pickle was run')",)


@pytest.mark.parametrize("place", ["compressor", "filters"])
@pytest.mark.parametrize("dtype", ["<f4", "|O"])
def test_pickles_are_not_run(tmp_path: Path, files: Any, draw: Any, place: str, dtype: str) -> None:
    """numcodecs has a codec that unpickles what is in a chunk, whatever the type of the elements."""
    zarr.save_array(tmp_path / "s.zarr", draw(4), zarr_format=2)
    path = tmp_path / "s.zarr" / ".zarray"
    codec = {"id": "pickle", "protocol": 5}
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"dtype": dtype, place: codec if place == "compressor" else [codec]})
    )
    (tmp_path / "s.zarr" / "0").write_bytes(pickle.dumps(Evil()))
    [reason] = files(tmp_path).bad().values()
    assert "pickle" in reason


def test_claims_of_size(tmp_path: Path, files: Any, draw: Any) -> None:
    root = zarr.open_group(tmp_path / "s.zarr", mode="w")
    root.create_array("huge", shape=(1 << 40,), chunks=(1 << 10,), dtype="f4")
    root.create_array("chunk", shape=(4,), chunks=(1 << 30,), dtype="f4")[:] = 1
    reasons = files(tmp_path).bad()
    assert "and the store has" in reasons["s/huge"]
    assert "its chunks" in reasons["s/chunk"]


def test_links_are_not_followed(tmp_path: Path, files: Any, draw: Any) -> None:
    zarr.open_group(tmp_path / "s.zarr", mode="w").create_array("a", data=draw(4))
    (tmp_path / "s.zarr" / "loop").symlink_to(tmp_path / "s.zarr")
    assert "a folder in it is a link" in files(tmp_path).bad()["s"]


@FORMATS
@pytest.mark.long
def test_damaged_stores(tmp_path: Path, files: Any, draw: Any, zarr_format: int) -> None:
    """Bytes of any file of a store are changed, or the file is cut short."""
    zarr.open_group(tmp_path / "s.zarr", mode="w", zarr_format=zarr_format).create_array("a", data=draw(4, 4))
    random = np.random.default_rng(0)
    contents = {path: path.read_bytes() for path in sorted((tmp_path / "s.zarr").rglob("*")) if path.is_file()}
    for path, content in contents.items():
        for turn in range(30):
            data = bytearray(content)
            if turn % 3 == 0:
                del data[random.integers(len(data)) :]
            else:
                data[random.integers(len(data))] = random.integers(256)
            path.write_bytes(data)
            assert isinstance(files(tmp_path).read(), list)
        path.write_bytes(content)
