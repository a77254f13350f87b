"""What the writers write, the readers read: keys, arrays bit for bit, and the fields that the format holds."""

from __future__ import annotations

import numpy as np
import pytest

from vqserve_data.items import Item
from vqserve_data.keys import key_of
from vqserve_data.readers import Selection, reader_of
from vqserve_data.sources import find
from vqserve_data.writers import FORMATS, writer_of

KEYS = ["a", "A", "b/a", "b/c/00000017", "träume/夜", "x" * 200, "with space", "a.b.c", ".hidden/.k", "50%", "50%2E"]
SUFFIX = {"npz": ".npz", "safetensors": ".safetensors", "tar": ".tar", "parquet": ".parquet"}
SELECT = {
    "tar": Selection(members=("indices.npy", "latents.npy")),
    "parquet": Selection(key="key"),
}


def written_and_read(form, folder, items):
    """Return what was read by key; the shard's own name is left out of it."""
    shard = writer_of(form).shard(folder, 0, {"digest": "ab" * 32})
    for key, (array, fields) in items.items():
        place = shard.place(key, array.shape, array.dtype)
        place[...] = array
        shard.add(key, place, fields)
    names = [written.name for written in shard.close()]
    read = {}
    if form == "npy":
        # Hidden files are not looked at in a folder.
        found = [file for name in names for file in find([str(folder / name)]).files]
    else:
        found = find([str(folder)]).files
    for name, file in zip(names, found, strict=True):
        for item in reader_of(file).read(file, SELECT.get(form, Selection())):
            assert isinstance(item, Item), item
            key = name.removesuffix(".npy") if form == "npy" else item.key.removeprefix("shard-00000/")
            read[key_of(key) if form == "tar" else key] = item
    return read


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int64", "float16", "float32", "float64"])
@pytest.mark.parametrize("form", [form for form in FORMATS if form != "stream"])
def test_readers_read_what_writers_write(form, dtype, tmp_path):
    rng = np.random.default_rng(0)
    items = {
        key: (rng.integers(0, 200, (2, i + 1)).astype(dtype) / (3 if dtype.startswith("f") else 1), {})
        for i, key in enumerate(KEYS)
    }
    items = {key: (array.astype(dtype), fields) for key, (array, fields) in items.items()}
    read = written_and_read(form, tmp_path, items)
    assert sorted(read) == sorted(items)
    for key, (array, _) in items.items():
        got = read[key].array[(slice(None),) * 2]
        assert (got.dtype, got.shape, got.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_fields_of_a_tar_go_through_as_they_are(tmp_path):
    fields = {"txt": b"a cat", "cls": b"3", "jpg": b"\xff\xd8", "more.json": b"{}"}
    read = written_and_read("tar", tmp_path, {"k.1": (np.arange(4, dtype=np.uint16), fields)})
    assert read["k.1"].fields == fields


def test_fields_of_a_table_go_through_as_they_are(tmp_path):
    fields = {"caption": "ü", "label": 3, "score": 0.5, "good": True, "jpg": b"\xff", "tags": ["a", "b"], "none": None}
    read = written_and_read("parquet", tmp_path, {"k.1": (np.arange(4, dtype=np.uint16), fields)})
    assert {**read["k.1"].fields} == {"key": "k.1", **fields}
