"""What a file is, is found by its content: formats that are read under any name, and others in one line each."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vqserve.errors import ForeignCheckpointError
from vqserve_tools import cli
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.importer import import_checkpoint

CODES = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)


@pytest.fixture
def refused(tmp_path, capsys) -> Callable[[str, bytes], str]:
    """Import a file of this name and content, which must be refused in one line; return the line."""

    def run(name: str, content: bytes) -> str:
        source, out = tmp_path / name, tmp_path / "out.safetensors"
        source.write_bytes(content)
        assert cli.main(["import", str(source), "-o", str(out), "--metric", "l2"]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert err.startswith(f"vqserved: error: {name}: it")
        assert not out.exists()
        return err

    return run


def safetensors() -> bytes:
    header = json.dumps({"codes": {"dtype": "F32", "shape": [10, 4], "data_offsets": [0, 160]}}).encode()
    return struct.pack("<Q", len(header)) + header + CODES.tobytes()


def torch_file(*, is_zip: bool) -> bytes:
    file = io.BytesIO()
    torch.save({"codes": torch.from_numpy(CODES)}, file, _use_new_zipfile_serialization=is_zip)
    return file.getvalue()


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, codes=CODES)
    return file.getvalue()


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, CODES)
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pt"), io.BytesIO())
    return file.getvalue()


def archive_of(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, b"x" * 1000)
    return file.getvalue()


POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt", ".npy", ".npz"])
@pytest.mark.parametrize(
    ("content", "match"),
    [
        pytest.param(b"", "it is empty (0 bytes): download it again", id="empty"),
        pytest.param(POINTER, "it is a git-LFS pointer", id="lfs"),
        pytest.param(b"<!DOCTYPE html>\n<html>Not found</html>", "it is a web page (HTML or XML)", id="html"),
        pytest.param(b"\n  <html lang='en'>", "it is a web page", id="html after space"),
        pytest.param(b"<?xml version='1.0'?><Error><Code>AccessDenied", "it is a web page", id="xml"),
        pytest.param(b'{"error": "Repository not found"}', "it is JSON, not weights", id="json"),
        pytest.param(b"Entry not found", "it is text ('Entry not found'), not weights", id="text"),
        pytest.param(b"Access to model x/y is restricted.\nLog in.", "it is text ('Access to model", id="text"),
        pytest.param(gzip.compress(npy()), "it is compressed by gzip", id="gzip"),
        pytest.param(b"\x28\xb5\x2f\xfd" + bytes(99), "it is compressed by zstd", id="zstd"),
        pytest.param(tar(), "it is a tar archive: unpack it", id="tar"),
        pytest.param(b"GGUF\x03\0\0\0" + bytes(99), "it is a GGUF file", id="gguf"),
        pytest.param(b"\x89HDF\r\n\x1a\n" + bytes(99), "it is an HDF5 file", id="hdf5"),
        pytest.param(b"\x08\x08\x12\x07pytorch\x1a\x062.4.0", "it is an ONNX model", id="onnx"),
        pytest.param(b"\x81\xa6params\x82\xa7encoder", "it is a MessagePack file of Flax", id="flax"),
        pytest.param(b"\xde\x00\x20\xa6params", "it is a MessagePack file of Flax", id="flax, large"),
        pytest.param(bytes(90) + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb", "part of a TensorFlow checkpoint", id="tf"),
        pytest.param(
            archive_of("a.txt")[:500], "it is a zip archive (numpy.savez, torch.save) that was cut short", id="half"
        ),
        pytest.param(b"PK\x05\x06" + bytes(18), "it is a zip archive without members", id="empty zip"),
    ],
)
def test_what_is_no_weights_is_said(refused, suffix, content, match):
    assert match in refused(f"model{suffix}", content)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("model.ckpt-9.data-00000-of-00001", "it is part of a TensorFlow checkpoint"),
        ("model.ckpt-9.index", "it is part of a TensorFlow checkpoint"),
        ("flax_model.msgpack", "it is a MessagePack file of Flax"),
        ("model.onnx", "it is an ONNX model"),
        ("saved_model.pb", "it is a TensorFlow graph"),
    ],
)
def test_a_name_tells_where_the_first_bytes_do_not(refused, name, match):
    assert match in refused(name, b"\x00\x01" * 99)


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".npz", ".npy", ".pth.tar", ".weights", ""])
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(safetensors(), id="safetensors"),
        pytest.param(torch_file(is_zip=True), id="torch"),
        pytest.param(torch_file(is_zip=False), id="older torch"),
        pytest.param(npz(), id="npz"),
    ],
)
def test_the_content_decides_not_the_suffix(tmp_path, suffix, content):
    source = tmp_path / f"model{suffix}"
    source.write_bytes(content)
    result = import_checkpoint(source, Options(keys=("codes",), metric="l2"))
    assert np.array_equal(result.quantizer.embedding.weight.detach().numpy(), CODES)


def test_one_array_of_any_name(tmp_path):
    source = tmp_path / "codes.bin"
    source.write_bytes(npy())
    assert import_checkpoint(source, Options(metric="l2")).quantizer.num_codes == len(CODES)


def test_an_archive_of_other_files(refused):
    for name in ("model.npz", "model.zip", "model"):
        assert "it is a zip archive without arrays: unpack it" in refused(name, archive_of("weights.txt"))
    refused("model.pt", archive_of("weights.txt"))


@pytest.mark.parametrize("part", [0.3, 0.9])
@pytest.mark.parametrize("content", [safetensors(), torch_file(is_zip=True), npz(), npy()])
def test_half_a_file(tmp_path, capsys, content, part):
    source = tmp_path / "model.bin"
    source.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ForeignCheckpointError, match=r"cut short|truncated"):
        import_checkpoint(source, Options(keys=() if content == npy() else ("codes",), metric="l2"))


def test_names_of_half_precision(tmp_path):
    # float8 tensors beside the codebook do not matter.
    source = tmp_path / "pytorch_model.bin"
    save_file({"codes": torch.from_numpy(CODES), "other": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, source)
    assert import_checkpoint(source, Options(keys=("codes",), metric="l2")).left == ("other",)


def test_noise_is_never_more_than_one_line(tmp_path):
    generator = np.random.default_rng(0)
    heads = [b"\x81\xa6", b"PK\x03\x04", b"\x93NUMPY", b"\x08\x08\x12\x07", b"\xde", b"\x08", b"{", b"<", b"\x80\x02"]
    for number in range(200):
        source = tmp_path / "noise.bin"
        source.write_bytes(heads[number % len(heads)] + generator.bytes(int(generator.integers(0, 600))))
        with pytest.raises(ForeignCheckpointError) as caught:
            import_checkpoint(source, Options(metric="l2"))
        assert "\n" not in str(caught.value)


def test_a_device_is_not_opened(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ForeignCheckpointError, match="it is no regular file"):
        import_checkpoint(Path(pipe), Options(metric="l2"))
