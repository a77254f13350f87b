"""Formats of arrays by name: .npy, .npz, .safetensors."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from vqserve_data.errors import FileError
from vqserve_data.items import BadItem, Item
from vqserve_data.readers import handle


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint8, np.int16, np.int64, ">f4", ">i8"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("whole_bytes", [1 << 20, 0], ids=["in memory", "by parts"])
def test_npy_of_numpy(
    tmp_path: Path,
    files: Any,
    same: Any,
    draw: Any,
    monkeypatch: pytest.MonkeyPatch,
    dtype: Any,
    order: str,
    whole_bytes: int,
) -> None:
    monkeypatch.setattr(handle, "WHOLE_BYTES", whole_bytes)
    array = np.asarray(draw(3, 5, 4, dtype=dtype), order=order)
    np.save(tmp_path / "a.npy", array)
    same(files(tmp_path / "a.npy").arrays(), {"a": array})
    [item] = files(tmp_path / "a.npy").read()
    np.testing.assert_array_equal(item.array[1:3, :, 2:], array[1:3, :, 2:])


@pytest.mark.parametrize("array", [np.float32(3), np.zeros((0, 4), np.float32), np.zeros((2, 0), "f2")])
def test_npy_without_axes_or_elements(tmp_path: Path, files: Any, same: Any, array: Any) -> None:
    np.save(tmp_path / "a.npy", array)
    same(files(tmp_path / "a.npy").arrays(), {"a": np.asarray(array)})


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.array([{}, 1], object), "Python objects"),
        (np.array(["a", "b"]), "not numbers"),
        (np.zeros(3, complex), "not numbers"),
        (np.zeros(3, [("x", "f4")]), "not numbers"),
        (np.zeros(3, bool), "not numbers"),
        (np.zeros(3, "M8[s]"), "not numbers"),
    ],
)
def test_what_is_no_array_of_numbers_is_bad(tmp_path: Path, files: Any, draw: Any, array: Any, reason: str) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    np.savez(tmp_path / "b.npz", bad=array, good=draw(3))
    assert reason in files(tmp_path / "a.npy").bad()["a"]
    bad, good = files(tmp_path / "b.npz").read()
    assert isinstance(bad, BadItem)
    assert reason in bad.reason
    assert isinstance(good, Item)
    assert [entry.key for entry in files(tmp_path / "b.npz").entries()] == ["b/bad", "b/good"]
    with pytest.raises(FileError, match=reason):
        files(tmp_path / "a.npy").entries()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("whole_bytes", [1 << 20, 0], ids=["in memory", "by parts"])
def test_npz_of_numpy(
    tmp_path: Path, files: Any, same: Any, draw: Any, monkeypatch: pytest.MonkeyPatch, save: Any, whole_bytes: int
) -> None:
    monkeypatch.setattr("vqserve_data.readers.npz.WHOLE_BYTES", whole_bytes)
    monkeypatch.setattr(handle, "WHOLE_BYTES", whole_bytes)
    arrays = {
        "z": draw(2, 3),
        "a.b": np.asfortranarray(draw(5, 6, dtype="f2")),
        "g/x": draw(0, 4),
        "n": draw(dtype="i4"),
    }
    save(tmp_path / "a.npz", **arrays)
    same(files(tmp_path / "a.npz").arrays(), {f"a/{name}": np.asarray(array) for name, array in arrays.items()})


def test_members_are_selected_by_pattern(tmp_path: Path, files: Any, draw: Any) -> None:
    np.savez(tmp_path / "a.npz", latents_0=draw(2), latents_1=draw(2), labels=draw(1))
    np.save(tmp_path / "b.npy", draw(2))
    assert list(files(tmp_path, members=("latents_*",)).arrays()) == ["a/latents_0", "a/latents_1", "b"]
    assert list(files(tmp_path / "a.npz", members=("labels", "*_1")).arrays()) == ["a/latents_1", "a/labels"]
    for call in (files(tmp_path, members=("x", "y")).read, files(tmp_path, members=("x", "y")).entries):
        with pytest.raises(FileError, match=r"a\.npz: no member matches x or y; it has latents_0, latents_1, labels"):
            call()


@pytest.mark.parametrize(
    "name", ["../up", "/root", "a//b", ".", "a/./b", "a\\b", "a\nb", "\x1b[31m", "x" * 201, "é" * 101, "\x85"]
)
def test_names_that_cannot_be_keys_are_bad(tmp_path: Path, files: Any, draw: Any, name: str) -> None:
    buffer = io.BytesIO()
    np.save(buffer, draw(2))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr(f"{name}.npy", buffer.getvalue())
        archive.writestr("good.npy", buffer.getvalue())
    bad, good = files(tmp_path / "a.npz").read()
    assert isinstance(bad, BadItem)
    assert "the name of the member" in bad.reason
    assert bad.key.isprintable()
    assert good.key == "a/good"
    safetensors.numpy.save_file({name: draw(2)}, tmp_path / "b.safetensors")
    assert "the name of the member" in next(iter(files(tmp_path / "b.safetensors").bad().values()))


def test_a_damaged_member_leaves_the_others(tmp_path: Path, files: Any, draw: Any) -> None:
    arrays = {"a": draw(100), "b": draw(100, seed=1), "c": draw(100, seed=2)}
    np.savez(tmp_path / "x.npz", **arrays)
    data = bytearray((tmp_path / "x.npz").read_bytes())
    place = data.find(arrays["b"].tobytes())
    data[place] ^= 1
    (tmp_path / "x.npz").write_bytes(data)
    good, bad, last = files(tmp_path / "x.npz").read()
    assert (good.key, bad.key, last.key) == ("x/a", "x/b", "x/c")
    assert "CRC" in bad.reason


def test_a_zip_bomb_is_bounded(tmp_path: Path, files: Any) -> None:
    """A header claims more than its compressed bytes can hold; another method could unpack to any size."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 1 << 10)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("claims.npy", header.getvalue() + bytes(100))
    with zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("other.npy", header.getvalue() + bytes(100))
    assert "incomplete" in files(tmp_path / "a.npz").bad()["a/claims"]
    assert "another method" in files(tmp_path / "b.npz").bad()["b/other"]


def test_safetensors_of_its_library(tmp_path: Path, files: Any, same: Any, draw: Any) -> None:
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    tensors = {
        "half": torch.from_numpy(draw(4, 3, dtype="f2")),
        "brain": torch.from_numpy(draw(5, 7)).bfloat16(),
        "wide": torch.from_numpy(draw(3, dtype="f8")),
        "codes": torch.arange(9, dtype=torch.int64).reshape(3, 3),
        "empty": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"any": "text"})
    found = files(tmp_path / "a.safetensors").arrays()
    expected = {f"a/{name}": tensor.float() if name == "brain" else tensor for name, tensor in tensors.items()}
    same({key: found[key] for key in expected}, {key: tensor.numpy() for key, tensor in expected.items()})


def test_large_bfloat16_is_widened_part_by_part(
    tmp_path: Path, files: Any, draw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    monkeypatch.setattr(handle, "WHOLE_BYTES", 0)
    tensor = torch.from_numpy(draw(6, 4, 5)).bfloat16()
    save_file({"x": tensor}, tmp_path / "a.safetensors")
    [item] = files(tmp_path / "a.safetensors").read()
    assert item.array.dtype == np.float32
    np.testing.assert_array_equal(item.array[2:4, :, 1:3], tensor.float().numpy()[2:4, :, 1:3])


def test_safetensors_that_lie_are_bad(tmp_path: Path, files: Any) -> None:
    def write(header: Any, data: bytes) -> dict[str, str]:
        text = json.dumps(header).encode()
        (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
        return files(tmp_path / "a.safetensors").bad()

    assert "shape" in write({"x": {"dtype": "F32", "shape": [1 << 50], "data_offsets": [0, 8]}}, bytes(8))["a"]
    assert "F8_E4M3" in write({"x": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}, bytes(8))["a/x"]
    assert "gap" in write({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8))["a"]
    assert "no arrays" in write({}, b"")["a"]
    (tmp_path / "a.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + bytes(100))
    assert "claims a header" in files(tmp_path / "a.safetensors").bad()["a"]


def test_an_array_outlives_its_generator_and_notices_a_cut(
    tmp_path: Path, files: Any, draw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handle, "WHOLE_BYTES", 0)
    array = draw(64, 64)
    np.save(tmp_path / "a.npy", array)
    [item] = files(tmp_path / "a.npy").read()
    np.testing.assert_array_equal(item.array[60:], array[60:])
    with (tmp_path / "a.npy").open("r+b") as file:
        file.truncate(8000)
    np.testing.assert_array_equal(item.array[:2], array[:2])
    with pytest.raises(FileError, match=r"a\.npy: it ends early"):
        item.array[()]


def test_empty_and_other_files_are_bad(tmp_path: Path, files: Any) -> None:
    for name in ("a.npy", "b.npz", "c.safetensors"):
        (tmp_path / name).write_bytes(b"")
    for name in ("d.npy", "e.npz", "f.safetensors"):
        (tmp_path / name).write_bytes(b"this is some text, and no array at all")
    assert set(files(tmp_path).bad()) == set("abcdef")
    with pytest.raises(FileError):
        files(tmp_path).entries()


@pytest.mark.long
def test_damaged_files(tmp_path: Path, files: Any, draw: Any, damaged: Any) -> None:
    np.save(tmp_path / "a.npy", draw(4, 4))
    np.savez_compressed(tmp_path / "b.npz", x=draw(4, 4), y=draw(3, dtype="i4"))
    safetensors.numpy.save_file({"x": draw(4, 4), "y": draw(3)}, tmp_path / "c.safetensors")
    for name in ("a.npy", "b.npz", "c.safetensors"):
        reasons = damaged(tmp_path / name)
        assert not any("allocate" in reason or "MemoryError" in reason for reason in reasons), reasons
