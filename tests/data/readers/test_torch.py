"""Files of torch.save, read without torch."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vqserve_data.errors import FileError

torch = pytest.importorskip("torch")


@pytest.fixture(params=[True, False], ids=["zip", "older format"])
def save(request: pytest.FixtureRequest) -> Any:
    return lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=request.param)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "uint8"])
@pytest.mark.parametrize("whole_bytes", [1 << 20, 0], ids=["in memory", "by parts"])
def test_a_tensor(
    tmp_path: Path,
    files: Any,
    same: Any,
    draw: Any,
    monkeypatch: pytest.MonkeyPatch,
    save: Any,
    dtype: str,
    whole_bytes: int,
) -> None:
    for name in ("handle", "torch"):
        monkeypatch.setattr(f"vqserve_data.readers.{name}.WHOLE_BYTES", whole_bytes)
    tensor = torch.from_numpy(draw(4, 3, 5)).abs().to(getattr(torch, dtype))
    expected = (tensor.float() if dtype == "bfloat16" else tensor).numpy()
    for name, value in (("a", tensor), ("b", tensor[1:3]), ("c", tensor.transpose(0, 2)), ("d", tensor[::2, :, 1])):
        save(value, tmp_path / f"{name}.pt")
    found = files(tmp_path).arrays()
    same(found, {"a": expected, "b": expected[1:3], "c": expected.transpose(2, 1, 0), "d": expected[::2, :, 1]})
    item = files(tmp_path / "b.pt").read()[0]
    np.testing.assert_array_equal(item.array[1:, :, 2:], expected[2:3, :, 2:])


def test_dictionaries_and_lists(tmp_path: Path, files: Any, same: Any, draw: Any, save: Any) -> None:
    a, b = draw(2, 3), draw(4)
    save({"latents": torch.from_numpy(a), "more": [torch.from_numpy(b), "text"], "label": 3}, tmp_path / "x.pth")
    same(files(tmp_path).arrays(), {"x/latents": a, "x/more.0": b})
    same(files(tmp_path, members=("lat*",)).arrays(), {"x/latents": a})


def test_what_holds_no_tensors_is_bad(tmp_path: Path, files: Any, save: Any) -> None:
    save({"a": 1}, tmp_path / "a.pt")
    save("text", tmp_path / "b.pt")
    (tmp_path / "c.pt").write_bytes(pickle.dumps([1, 2]))
    (tmp_path / "d.pt").write_bytes(b"")
    save(torch.zeros(2, dtype=torch.complex64), tmp_path / "e.pt")
    reasons = files(tmp_path).bad()
    assert list(reasons) == ["a", "b", "c", "d", "e"]
    assert not any(".pt" in reason for reason in reasons.values()), reasons


class Evil:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('a pickle was run')",)


def test_nothing_is_run(tmp_path: Path, files: Any, draw: Any, save: Any) -> None:
    """torch with weights_only refuses the file; here what is no tensor is left out."""
    save({"evil": Evil(), "x": torch.from_numpy(draw(3))}, tmp_path / "a.pt")
    assert list(files(tmp_path).arrays()) == ["a/x"]


def test_a_tensor_that_claims_more_than_it_has(tmp_path: Path, files: Any, save: Any) -> None:
    save(torch.zeros(1).expand(1 << 20), tmp_path / "a.pt")
    [reason] = files(tmp_path).bad().values()
    assert "claims" in reason


@pytest.mark.long
def test_damaged_files(tmp_path: Path, draw: Any, damaged: Any, save: Any) -> None:
    save({"x": torch.from_numpy(draw(4, 4)), "y": torch.from_numpy(draw(3))}, tmp_path / "a.pt")
    reasons = damaged(tmp_path / "a.pt", cuts=200, flips=400)
    assert not any("MemoryError" in reason for reason in reasons), reasons


def test_torch_is_not_needed(tmp_path: Path, draw: Any, save: Any) -> None:
    save(torch.from_numpy(draw(3)), tmp_path / "a.pt")
    code = """
import sys
sys.modules["torch"] = None
from vqserve_data.sources import find
from vqserve_data.readers import Selection, reader_of
[file] = find(sys.argv[1:]).files
print(next(reader_of(file).read(file, Selection())).array.shape)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "(3,)\n"


def test_other_files_are_refused(tmp_path: Path, files: Any) -> None:
    (tmp_path / "a.pt").write_bytes(b"some text")
    with pytest.raises(FileError):
        files(tmp_path).entries()
