"""Foreign files made by an enemy: nothing in them is run, and they cost no memory to speak of."""

from __future__ import annotations

import io
import json
import os
import pickle
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from vqserve_tools import cli

MIB = 1 << 20
# What an import of a small array may take beyond what the process has already.
_LIMIT = 64 * MIB


def memory(name: str) -> int:
    """Return VmRSS, the memory of this process, or VmHWM, its peak, in bytes."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


@pytest.fixture
def imported(capsys) -> Callable[..., tuple[int, str, int]]:
    """Import a file; return exit status, stderr, and by how many bytes memory grew at its peak."""

    def run(source: Path, *flags: str) -> tuple[int, str, int]:
        out = source.with_name("out.safetensors")
        # Forgets the peak so far.
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        status = cli.main(["import", str(source), "-o", str(out), "--metric", "l2", *flags])
        grown = memory("VmHWM") - before
        assert out.exists() == (status == 0)
        return status, capsys.readouterr()[1], grown

    return run


@pytest.fixture
def refused(imported) -> Callable[..., None]:
    """Import a file that must be refused in one line, which `match` is part of, with no memory to speak of."""

    def run(source: Path, match: str, *flags: str) -> None:
        status, err, grown = imported(source, *flags)
        assert (status, err.count("\n")) == (1, 1), err
        assert match in err
        assert grown < _LIMIT

    return run


def test_memory_is_seen_where_it_is_taken(imported, tmp_path):
    source = tmp_path / "codes.npy"
    np.save(source, np.ones((3, 2), np.float32))
    status, _, grown = imported(source)
    assert status == 0
    assert grown < _LIMIT
    source = tmp_path / "large.npy"
    np.save(source, np.ones((1 << 16, 512), np.float32))
    status, _, grown = imported(source, "--force")
    assert status == 0
    assert grown > _LIMIT


# Pickles.


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".th"])
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_payload_is_named_and_not_run(refused, tmp_path, suffix, is_zip):
    marker, source = tmp_path / "marker", tmp_path / f"evil{suffix}"
    state = {"embedding.weight": torch.zeros(3, 2), "callback": Payload(marker)}
    torch.save(state, source, _use_new_zipfile_serialization=is_zip)
    refused(source, "could run code when loaded; where it was made, load it and save its tensors alone")
    assert not marker.exists()


def torch_archive(path: Path, description: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", description)
        archive.writestr("archive/version", b"3\n", zipfile.ZIP_STORED)
    return path


def test_a_hand_made_pickle_in_an_archive(refused, tmp_path):
    marker = tmp_path / "marker"
    source = torch_archive(tmp_path / "evil.pt", pickle.dumps(Payload(marker), protocol=2))
    refused(source, "it holds Python objects (")
    assert not marker.exists()


def test_a_compressed_description_is_not_unpacked(refused, tmp_path):
    source = torch_archive(tmp_path / "bomb.pt", bytes(256 * MIB), zipfile.ZIP_DEFLATED)
    assert source.stat().st_size < 4 * MIB
    refused(source, "'archive/data.pkl' is compressed, which torch.save never does")


def test_a_description_that_is_too_long(refused, tmp_path):
    source = torch_archive(tmp_path / "long.pt", bytes(17 * MIB))
    refused(source, "'archive/data.pkl' has 17825792 bytes, more than the description of any model")


@pytest.mark.long
def test_a_description_of_the_older_format_that_is_too_long(refused, imported, tmp_path):
    # As torch writes it: a number, a protocol, the system, the description.
    source = tmp_path / "long.pt"
    source.write_bytes(pickle.dumps(torch.serialization.MAGIC_NUMBER, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2))
    with source.open("ab") as file:
        file.write(b"\x80\x02X" + struct.pack("<I", 17 * MIB) + b"a" * 17 * MIB + b".")
    refused(source, "its description has more bytes than the description of any model (16777216)")
    torch.save({"embedding.weight": torch.ones(1 << 17, 64)}, source, _use_new_zipfile_serialization=False)
    assert source.stat().st_size > 32 * MIB
    assert imported(source)[0] == 0


def test_a_directory_that_only_torch_would_find(refused, tmp_path):
    # zipfile reads the directory in front of the end record, torch the one that the record points to.
    source = tmp_path / "two.pt"
    torch.save({"embedding.weight": torch.zeros(3, 2)}, source)
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(source, "w") as archive:
        for name, data in members.items():
            is_description = name.endswith("data.pkl")
            compression = zipfile.ZIP_DEFLATED if is_description else zipfile.ZIP_STORED
            archive.writestr(name, data + bytes(256 * MIB if is_description else 0), compression)
        offset = archive.start_dir
    content = source.read_bytes()
    directory, end = content[offset:-22], bytearray(content[-22:])
    harmless = bytearray(directory)
    # Of the first member, the description: stored, and as long as it is compressed.
    harmless[10:12], harmless[24:28] = bytes(2), harmless[20:24]
    source.write_bytes(content[:offset] + directory + harmless + end)
    refused(source, "its archive is not as torch.save writes it")


@pytest.mark.parametrize("is_wide", [False, True])
def test_archives_with_narrow_and_wide_offsets_are_read(imported, tmp_path, monkeypatch, is_wide):
    source = tmp_path / "saved.pt"
    torch.save({"embedding.weight": torch.ones(3, 2)}, source)
    assert (source.read_bytes()[-42:-38] == b"PK\6\7") or not is_wide
    if not is_wide:
        with zipfile.ZipFile(source) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(source, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
    assert imported(source)[0] == 0


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def test_a_key_whose_text_would_fill_memory(refused, tmp_path):
    # A tuple that names one string thirty thousand times.
    key = b"(" + text("a" * MIB) + b"q\x00" + b"h\x00" * 30_000 + b"t"
    refused(torch_archive(tmp_path / "key.pt", b"\x80\x02}" + key + b"}s."), "there is no quantizer at its root")


def test_a_long_name_in_very_many_dictionaries(refused, tmp_path):
    name = text("a" * MIB) + b"q\x00"
    entries = [
        b"M" + struct.pack("<H", number) + b"}" + (b"h\x00" if number else name) + b"}ss" for number in range(300)
    ]
    source = torch_archive(tmp_path / "names.pt", b"\x80\x02}" + b"".join(entries) + b".")
    refused(source, "a name in it has more than 4096 characters")


@pytest.mark.timeout(60)
def test_a_name_of_very_many_wrappers(refused, tmp_path):
    claim = {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]}
    header = json.dumps({"module." * 100_000 + "embedding.weight": claim}).encode()
    source = tmp_path / "names.safetensors"
    source.write_bytes(struct.pack("<Q", len(header)) + header + bytes(24))
    refused(source, "a name in it has more than 4096 characters")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("suffix", [".pt", ".jit"])
def test_a_torchscript_program(refused, tmp_path, suffix):
    source = tmp_path / f"program{suffix}"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), str(tmp_path / "program.pt"))
    (tmp_path / "program.pt").rename(source)
    refused(source, "it is a TorchScript program, which is code and is not loaded")


def test_dictionaries_that_hold_each_other(refused, tmp_path):
    inner: dict[str, object] = {"w": torch.zeros(2, 2)}
    for _ in range(30):
        inner = dict.fromkeys("abcdefgh", inner)
    source = tmp_path / "laughs.pt"
    torch.save(inner, source)
    assert source.stat().st_size < MIB
    refused(source, "its dictionaries contain each other")
    endless: dict[str, object] = {}
    endless["again"] = endless
    torch.save(endless, source)
    refused(source, "its dictionaries contain each other")


def test_a_storage_that_is_not_there(refused, tmp_path):
    source = tmp_path / "short.pt"
    torch.save({"a": torch.zeros(1000, 1000)}, source)
    with zipfile.ZipFile(source) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(source, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data[:100] if "/data/" in name else data)
    refused(source, "short.pt: it", "--key", "a")


# Archives of arrays.


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def deflated(path: Path, name: str, header: bytes, zeros: int) -> Path:
    """Write an archive whose member is a header and very many zeros, without ever having them in memory."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(name, "w", force_zip64=True) as file:
        file.write(header)
        for _ in range(zeros // MIB):
            file.write(bytes(MIB))
    return path


def test_a_zip_bomb(refused, tmp_path):
    shape = (1 << 18, 512)
    header = npy(np.zeros((0, 512), np.float32)).replace(b"(0, 512)", str(shape).encode())
    # numpy pads its header: what is longer now is taken from the padding.
    header = header.replace(b" " * (len(header) - 128), b"", 1)
    source = deflated(tmp_path / "bomb.npz", "codes.npy", header, 4 * shape[0] * shape[1])
    assert source.stat().st_size < 4 * MIB
    refused(source, "no trained codebook compresses that much", "--key", "codes")


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressions_that_unpack_all_at_once(refused, tmp_path, compression):
    source = tmp_path / "bomb.npz"
    with zipfile.ZipFile(source, "w", compression) as archive:
        archive.writestr("codes.npy", npy(np.zeros((1 << 15, 512), np.float32)))
    refused(source, "'codes.npy' is compressed by another method than deflate", "--key", "codes")


def test_a_bomb_in_many_small_pieces(imported, tmp_path):
    source = tmp_path / "bomb.npz"
    stage = np.zeros((1 << 15, 64), np.float32)
    np.savez_compressed(source, **{f"layers.{i}._codebook.embed": stage for i in range(64)})
    assert source.stat().st_size < MIB
    status, err, grown = imported(source)
    assert status == 1
    assert "no trained codebook compresses that much" in err
    assert grown < 3 * _LIMIT


def test_a_header_that_is_a_bomb(refused, tmp_path):
    header = b"\x93NUMPY\x02\x00" + struct.pack("<I", 2 << 30)
    source = deflated(tmp_path / "bomb.npz", "codes.npy", header, 128 * MIB)
    refused(source, "claims a header of 2147483648 bytes", "--key", "codes")


def test_a_sparse_file_with_a_long_header(refused, tmp_path):
    source = tmp_path / "sparse.npy"
    with source.open("wb") as file:
        file.write(b"\x93NUMPY\x02\x00" + struct.pack("<I", 3 << 30))
        file.truncate(3 << 30)
    refused(source, "claims a header of 3221225472 bytes")


def test_numbers_that_shrink_as_numbers_do_are_unpacked(imported, tmp_path):
    codes = np.random.default_rng(0).standard_normal((1 << 12, 64)).astype(np.float32)
    codes[1 << 11 :] = 0
    source = tmp_path / "codes.npz"
    np.savez_compressed(source, codes=codes)
    assert imported(source, "--key", "codes")[0] == 0


@pytest.mark.parametrize("name", ["../codes.npy", "a/../../codes.npy", "/codes.npy", "..\\codes.npy"])
@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_members_that_point_out_of_the_archive(refused, tmp_path, name, suffix):
    source = tmp_path / f"evil{suffix}"
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr(name, npy(np.ones((3, 2), np.float32)))
    refused(source, "points out of the archive", "--key", name.removesuffix(".npy"))


def test_members_that_are_links(refused, tmp_path):
    source = tmp_path / "link.npz"
    member = zipfile.ZipInfo("codes.npy")
    member.create_system = 3
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr(member, "/etc/passwd")
    refused(source, "'codes.npy' is a link, not an array", "--key", "codes")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_of_one_name(refused, tmp_path):
    source = tmp_path / "twice.npz"
    with zipfile.ZipFile(source, "w") as archive:
        for value in (0, 1):
            archive.writestr("codes.npy", npy(np.full((3, 2), value, np.float32)))
    refused(source, "two members 'codes.npy'", "--key", "codes")


# safetensors.


def container(path: Path, header: dict[str, object], data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize("is_there", [True, False])
def test_a_header_of_100_mib(refused, tmp_path, is_there):
    source = tmp_path / "long.safetensors"
    with source.open("wb") as file:
        file.write(struct.pack("<Q", 100 * MIB) + b'{"a":' + b" " * 1000)
        if is_there:
            file.truncate(8 + 100 * MIB)
    refused(source, "claims a header of 104857600 bytes (at most 16777216 are read)", "--key", "a")


@pytest.mark.long
def test_the_longest_header_that_is_read(imported, tmp_path):
    # As many tensors as fit, none of them of any size: what JSON makes of it is bounded.
    entry = '"%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = "{" + ",".join(entry % number for number in range(16 * MIB // (len(entry % 0) + 1) - 1)) + "}"
    source = tmp_path / "many.safetensors"
    source.write_bytes(struct.pack("<Q", len(text)) + text.encode())
    status, err, grown = imported(source, "--key", "a")
    assert status == 1
    assert "there is no array 'a'" in err
    assert grown < 1 << 30


def test_offsets_that_overlap(refused, tmp_path):
    entry = {"dtype": "F32", "shape": [3, 2]}
    header = {"a": {**entry, "data_offsets": [0, 24]}, "b": {**entry, "data_offsets": [16, 40]}}
    refused(container(tmp_path / "o.safetensors", header, bytes(40)), "a gap or an overlap before", "--key", "a")


def test_offsets_that_all_name_the_same_bytes(refused, tmp_path):
    header = {f"t{i}": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]} for i in range(1000)}
    refused(container(tmp_path / "o.safetensors", header, bytes(24)), "a gap or an overlap before", "--key", "t0")


# What is no file.


def test_pipes_devices_and_folders(refused, tmp_path):
    pipe = tmp_path / "pipe.npy"
    os.mkfifo(pipe)
    refused(pipe, "pipe.npy: it is no regular file")
    endless = tmp_path / "endless.npy"
    endless.symlink_to("/dev/zero")
    refused(endless, "endless.npy: it is no regular file")
    folder = tmp_path / "folder.npz"
    folder.mkdir()
    refused(folder, "folder.npz: it has no weights")
    dangling = tmp_path / "dangling.pt"
    dangling.symlink_to(tmp_path / "nowhere.pt")
    refused(dangling, "dangling.pt: there is no such file")


def test_a_link_to_a_file_is_the_file(imported, tmp_path):
    # Download caches keep their files behind links.
    np.save(tmp_path / "blob.npy", np.ones((3, 2), np.float32))
    link = tmp_path / "codes.npy"
    link.symlink_to("blob.npy")
    assert imported(link)[0] == 0


# Folders.


def test_a_configuration_that_is_a_bomb(imported, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save({"quantize.embedding.weight": torch.zeros(3, 2)}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text('{"a": [' + ",".join(["[]"] * 300_000) + "]}")
    status, _, grown = imported(folder)
    assert status == 0
    assert grown < 64 * MIB


def test_a_configuration_and_an_index_that_have_no_end(imported, refused, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save({"quantize.embedding.weight": torch.zeros(3, 2)}, folder / "pytorch_model.bin")
    os.mkfifo(folder / "config.json")
    (folder / "model.safetensors.index.json").symlink_to("/dev/zero")
    assert imported(folder)[0] == 0
    refused(folder / "model.safetensors.index.json", "it is no regular file")
