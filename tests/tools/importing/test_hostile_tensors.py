"""Torch files whose tensors, numbers or archives are not what they claim to be."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from pathlib import Path

import pytest
import torch

from support.hostile import members_of, read_watched, text, write_members

STATE = {"embedding.weight": torch.arange(6.0).reshape(3, 2)}


KEY = text("0")


def tensor(shape=b"K\x03K\x02\x86", strides=b"K\x02K\x01\x86", offset=b"K\x00", kind=b"FloatStorage", length=b"K\x06",
           key=KEY) -> bytes:  # fmt: skip
    storage = b"(" + text("storage") + b"ctorch\n" + kind + b"\n" + key + text("cpu") + length + b"tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + shape + strides + b"\x89NtR"


def with_tensor(path: Path, description: bytes) -> Path:
    members = {
        "m/data.pkl": b"\x80\x02}" + text("embedding.weight") + description + b"s.",
        "m/data/0": struct.pack("<6f", *range(6)),
    }
    return write_members(path, members)


def test_the_tensor_that_does_not_lie(tmp_path):
    values, seen = read_watched(with_tensor(tmp_path / "m.pt", tensor()))
    assert values == {"embedding.weight": [[0, 1], [2, 3], [4, 5]]}
    assert seen == []


FAR = b"\x8a\x08" + struct.pack("<q", (1 << 61) + 1)
LIES = {
    "an offset beyond": (tensor(offset=b"K\x01"), "claims 28 bytes, more than the file has for it (24)"),
    "an offset far beyond": (tensor(offset=FAR), "more than the file has for it (24)"),
    "an offset below": (tensor(offset=b"J\xff\xff\xff\xff"), "it is damaged"),
    "an offset that is none": (tensor(offset=b"N"), "it is damaged"),
    "an offset that is a truth": (tensor(offset=b"\x88"), "it is damaged"),
    "strides beyond": (tensor(strides=b"K\x03K\x01\x86"), "claims 32 bytes, more than the file has for it (24)"),
    "strides far beyond": (tensor(strides=FAR * 2 + b"\x86"), "more than the file has for it (24)"),
    "strides below": (tensor(strides=b"J\xff\xff\xff\xffK\x01\x86"), "it is damaged"),
    "strides of zero": (tensor(shape=FAR + b"K\x02\x86", strides=b"K\x00K\x00\x86"), "more than 4294967296"),
    "fewer strides": (tensor(strides=b"K\x01\x85"), "it is damaged"),
    "a shape below": (tensor(shape=b"J\xff\xff\xff\xffK\x02\x86"), "it is damaged"),
    "a shape far beyond": (tensor(shape=FAR * 2 + b"\x86"), "more than 4294967296"),
    "a shape that is none": (tensor(shape=b"N"), "it is damaged"),
    "a shape of text": (tensor(shape=text("ab")), "it is damaged"),
    "axes without end": (tensor(shape=b"(" + b"K\x01" * 65 + b"t", strides=b"(" + b"K\x01" * 65 + b"t"), "is damaged"),
    "a longer storage": (tensor(length=b"K\x07"), "it has 24 bytes of the numbers '0', of 28 described"),
    "a wider storage": (tensor(kind=b"DoubleStorage"), "it has 24 bytes of the numbers '0', of 48 described"),
    "a storage of no type": (tensor(kind=b"Storage"), "numbers of an unknown type"),
    "a storage of no length": (tensor(length=b"N"), "it is damaged"),
    "a storage far beyond": (tensor(length=FAR), "it has 24 bytes of the numbers '0'"),
    "another storage": (tensor(key=text("1")), "it has 0 bytes of the numbers '1'"),
    "a storage outside": (tensor(key=text("../../etc/passwd")), "it has 0 bytes of the numbers '../../etc/passwd'"),
    "a storage without a name": (tensor(key=b"N"), "it is damaged"),
    "one storage of two types": (
        tensor() + b"0" + tensor(kind=b"IntStorage"),
        "it describes the numbers '0' in two ways",
    ),
}


@pytest.mark.parametrize(("description", "match"), LIES.values(), ids=LIES)
def test_tensors_that_lie(refused, tmp_path, description, match):
    refused(with_tensor(tmp_path / "m.pt", description), match)


def test_numbers_that_do_not_match_their_checksum(refused, imported, tmp_path):
    source = tmp_path / "m.pt"
    torch.save({"embedding.weight": torch.ones(1000, 2)}, source)
    data = bytearray(source.read_bytes())
    place = data.index(struct.pack("<2f", 1, 1)) + 400
    data[place] ^= 1
    source.write_bytes(data)
    refused(source, "it is damaged: the checksum of its numbers '0' differs")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"embedding.weight": torch.ones(1000, 2)}, source)
    finally:
        torch.serialization.set_crc32_options(True)
    assert imported(source)[0] == 0


def test_members_that_are_not_where_the_directory_says(refused, tmp_path):
    source = with_tensor(tmp_path / "m.pt", tensor())
    data = source.read_bytes()
    source.write_bytes(data.replace(b"m/data/0", b"m/data/1", 1))
    refused(source, "its member 'm/data/0' is not where its directory says")
    for old, new, match in (
        ("m/data/0", "M/DATA/0", "names differ in case only"),
        ("m/data.pkl", "m/Data.pkl", "names differ in case only"),
    ):
        members = members_of(with_tensor(source, tensor()))
        refused(write_members(source, {**members, new: members[old]}), match)
    members = members_of(with_tensor(source, tensor()))
    assert read_watched(write_members(source, {**members, "data.pkl": b"N.", "n/data.pkl": b"N."}))[0] == {
        "embedding.weight": STATE["embedding.weight"].tolist()
    }
    refused(write_members(source, {"m/other.pkl": b"."}), "its archive has no data.pkl, so torch.save did not write it")
    refused(
        write_members(source, {**members_of(with_tensor(source, tensor())), "m/byteorder": b"middle"}), "byte order"
    )


def test_an_archive_with_a_very_long_directory(refused, tmp_path):
    source = tmp_path / "m.pt"
    name = "m/" + "a" * 60_000
    write_members(source, {f"{name}{number}": b"" for number in range(300)})
    refused(source, "its archive's directory has")


def test_the_older_format_that_lies(refused, tmp_path):
    source = tmp_path / "m.pt"
    torch.save(STATE, source, _use_new_zipfile_serialization=False)
    data = source.read_bytes()
    count = data.rindex(struct.pack("<q", 6) + struct.pack("<f", 0))
    for length in (5, 7, 1 << 62, -1):
        source.write_bytes(data[:count] + struct.pack("<q", length) + data[count + 8 :])
        refused(source, "it is damaged")
    source.write_bytes(data[:-1])
    refused(source, "it is damaged: it ends early")
    source.write_bytes(pickle.dumps({"embedding.weight": [1.0]}))
    refused(source, "it is a pickle that torch.save did not write")


@pytest.mark.filterwarnings("ignore")
def test_the_tar_format_has_a_way_out(refused, imported, tmp_path, monkeypatch):
    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return "9" if isinstance(value, torch.Tensor) else None

    def dumped(*values: object) -> bytes:
        return b"".join(pickle.dumps(value, 2) for value in values)

    description = io.BytesIO()
    Pickler(description, 2).dump(STATE)
    # As torch wrote it until 0.1.9: storages with their keys, and views; tensors with their axes; names.
    storages = dumped(1, (7, "cpu", torch.FloatStorage)) + struct.pack("<q6f", 6, *range(6)) + dumped([])
    tensors = dumped(1, (9, 7, "torch.FloatTensor")) + struct.pack("<ii5q", 2, 0, 3, 2, 2, 1, 0)
    with tarfile.open(tmp_path / "old.pt", "w:") as archive:
        for name, data in (("storages", storages), ("tensors", tensors), ("pickle", description.getvalue())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    way_out = "torch.save(torch.load(FILE, weights_only=False), 'weights.pt')"
    refused(tmp_path / "old.pt", f"tar format of 2016, which is not read; if you trust it, save it again: {way_out}")
    monkeypatch.chdir(tmp_path)
    exec(way_out, {"torch": torch, "FILE": "old.pt"})  # noqa: S102
    assert imported(tmp_path / "weights.pt")[0] == 0
    assert read_watched(tmp_path / "weights.pt")[0] == {"embedding.weight": STATE["embedding.weight"].tolist()}
