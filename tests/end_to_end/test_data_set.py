"""As a new user would: from 300 mixed files to tokens and back, with the demo codebook and no line of Python."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from support.trees import tree
from vqserve_server import Tokenizer
from vqserve_server.codebook_files import DEMO_PATH

DIM = 16


def latents(number: int, dtype: str = "float32") -> np.ndarray:
    """Latents of the demo codebook: images of different sizes, one or several."""
    generator = np.random.default_rng(number)
    shape = (int(generator.integers(1, 4)), DIM, *generator.integers(1, 9, 2))
    return generator.standard_normal(shape).astype(dtype)


@pytest.fixture
def folder(tmp_path):
    """290 .npy files in folders, archives and tables, and one file of every fault. Returns the good arrays by key."""
    h5py, pa, parquet, safetensors = (
        pytest.importorskip(name) for name in ("h5py", "pyarrow", "pyarrow.parquet", "safetensors.numpy")
    )
    root = tmp_path / "latents"
    good = {}
    for number in range(290):
        key = f"part{number % 7}/{number:03}"
        good[key] = latents(number, ("float32", "float16", "float64")[number % 3])
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / f"{key}.npy", good[key])
    several = {name: latents(1000 + number) for number, name in enumerate(("x", "y", "z"))}
    np.savez(root / "archive.npz", **several)
    safetensors.save_file(several, root / "tensors.safetensors")
    with h5py.File(root / "group.h5", "w") as file:
        for name, array in several.items():
            file[f"deep/{name}"] = array
    table = pa.table({"latents": [array.tolist() for array in several.values()], "caption": list(several)})
    parquet.write_table(table, root / "table.parquet")
    with tarfile.open(root / "samples.tar", "w") as tar:
        for name, array in several.items():
            content = io.BytesIO()
            np.save(content, array)
            for suffix, data in (("npy", content.getvalue()), ("txt", name.encode())):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    for number, (name, array) in enumerate(several.items()):
        good |= {f"archive/{name}": array, f"tensors/{name}": array, f"group/deep/{name}": array}
        good |= {f"samples/{name}": array, f"table/{number:08}": array}
    nan = latents(2000)
    nan.flat[3] = np.nan
    np.save(root / "nan.npy", nan)
    np.save(root / "channels.npy", np.zeros((1, DIM + 1, 2, 2), np.float32))
    (root / "corrupt.npy").write_bytes((root / "part0" / "000.npy").read_bytes()[:-1])
    (root / "empty.npy").write_bytes(b"")
    (root / "README.txt").write_text("not latents")
    return root, good


def test_there_and_back_in_three_commands(vqserved, folder, tmp_path):
    root, good = folder
    daemon = vqserved("--device", "cpu")

    def vqserve(*arguments):
        command = [sys.executable, "-m", "vqserve", *map(str, arguments), "--target", daemon.target]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    code, out, said = vqserve("encode", root, "-o", tmp_path / "tokens", "--dry-run")
    assert (code, said) == (0, "")
    assert "299 files" in out
    code, _, said = vqserve("encode", root, "-o", tmp_path / "tokens")
    assert code == 3, said
    assert f"{len(good)} items" in said
    lines = map(json.loads, (tmp_path / "tokens" / "errors.jsonl").read_text().splitlines())
    assert sorted(line["key"] for line in lines) == ["channels", "corrupt", "empty", "nan"]
    code, _, said = vqserve("decode", tmp_path / "tokens", "-o", tmp_path / "decoded")
    assert code == 0, said
    with Tokenizer.load(DEMO_PATH, device="cpu") as tokenizer:
        for key, array in good.items():
            indices = tokenizer.encode(array)
            assert (np.load(tmp_path / "tokens" / f"{key}.npy") == indices).all(), key
            assert (np.load(tmp_path / "decoded" / f"{key}.npy") == tokenizer.decode(indices)).all(), key
    # The same from a glob of the files, to another folder: byte for byte, but for the names of the sources.
    code, _, said = vqserve("encode", root, "-o", tmp_path / "again", "--quiet")
    assert (code, said) == (3, "")
    assert tree(tmp_path / "again") == tree(tmp_path / "tokens")
