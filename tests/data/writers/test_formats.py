"""Each format, read back by the library whose format it is."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
import zipfile

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from safetensors import safe_open
from safetensors.numpy import load_file

from vqserve_data.errors import FileError
from vqserve_data.keys import key_of, sample_of
from vqserve_data.stream import TokenStream
from vqserve_data.writers import FORMATS, add_writer, writer_of

METADATA = {"codebook": "demo", "digest": "ab" * 32}
INTEGERS = [f"{kind}{bits}" for kind in ("uint", "int") for bits in (8, 16, 32, 64)]
FLOATS = ["float16", "float32", "float64"]
KEYS = [
    "a",
    "A",
    "b/a",
    "b/c/00000017",
    "träume/夜",
    "x" * 200,
    "with space",
    "a.b.c",
    ".hidden",
    "50%",
    "50%2E",
    "a.npy.b",
]


def array_of(shape, dtype, seed=0):
    dtype = np.dtype(dtype)
    rng = np.random.default_rng([seed, *shape])
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    top = min(np.iinfo(dtype).max, 2**32 - 1)
    return rng.integers(0, top, shape, np.uint64, endpoint=True).astype(dtype)


def write(form, folder, items, metadata=METADATA, number=0):
    folder.mkdir(exist_ok=True)
    shard = writer_of(form).shard(folder, number, metadata)
    for key, array, *fields in items:
        place = shard.place(key, array.shape, array.dtype)
        place[...] = array
        shard.add(key, place, *fields or [{}])
    assert shard.nbytes == sum(array.nbytes for _, array, *_ in items)
    written = shard.close()
    shard.abandon()
    assert [(folder / each.name).stat().st_size for each in written] == [each.nbytes for each in written]
    return written


def read_npy(folder):
    paths = sorted(folder.rglob("*.npy"))
    return {path.relative_to(folder).as_posix().removesuffix(".npy"): np.load(path) for path in paths}


def read_npz(folder):
    with np.load(folder / "shard-00000.npz") as arrays:
        return dict(arrays)


def read_safetensors(folder):
    # Its reader has tensors without elements in any order.
    return dict(sorted(load_file(folder / "shard-00000.safetensors").items()))


def samples_of(folder):
    return list(wds.WebDataset(str(folder / "shard-00000.tar"), shardshuffle=False).decode())


def read_tar(folder):
    samples = samples_of(folder)
    return {key_of(each["__key__"]): each.get("indices.npy", each.get("latents.npy")) for each in samples}


def read_parquet(folder):
    # The column's type has the dtype, its nesting the number of axes.
    table = pq.read_table(folder / "shard-00000.parquet")
    kind = table.schema.field(1).type
    while hasattr(kind, "value_type"):
        kind = kind.value_type
    dtype = np.dtype(kind.to_pandas_dtype())
    return {
        key: np.array(value, dtype) for key, value in zip(table["key"].to_pylist(), table[1].to_pylist(), strict=True)
    }


def read_stream(folder):
    stream = TokenStream(folder)
    return dict(zip(stream.keys, stream, strict=True))


READ = {
    "npy": read_npy,
    "npz": read_npz,
    "safetensors": read_safetensors,
    "tar": read_tar,
    "parquet": read_parquet,
    "stream": read_stream,
}


def same(read, items, *, dtype=None):
    assert list(read) == [key for key, *_ in items]
    for key, array, *_ in items:
        assert (read[key].shape, read[key].dtype) == (array.shape, dtype or array.dtype), key
        assert read[key].tobytes() == array.astype(dtype or array.dtype).tobytes(), key


@pytest.mark.parametrize("dtype", INTEGERS + FLOATS)
@pytest.mark.parametrize("form", [form for form in FORMATS if form != "stream"])
def test_the_library_reads_each_type_bit_for_bit(form, dtype, tmp_path):
    items = [(f"k{i}", array_of(shape, dtype)) for i, shape in enumerate([(3, 4), (1, 1), (7, 2)])]
    if np.dtype(dtype).kind == "f":
        items[0][1].flat[:4] = [np.nan, np.inf, -0.0, np.finfo(dtype).smallest_subnormal]
    write(form, tmp_path / "out", items)
    same(READ[form](tmp_path / "out"), items)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_a_stream_has_16_bits_or_32(dtype, tmp_path):
    items = [(f"k{i}", array_of((i, 2), dtype)) for i in range(4)]
    write("stream", tmp_path / "out", items)
    stored = np.dtype("<u2") if dtype in {"uint8", "uint16"} else np.dtype("<u4")
    same(read_stream(tmp_path / "out"), items, dtype=stored)
    flat = np.memmap(tmp_path / "out/shard-00000.bin", stored, mode="r")
    assert (flat == np.concatenate([array.reshape(-1) for _, array in items])).all()


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (np.ones(2, np.float32), "it is float32, and a stream holds indices only"),
        (np.array([0, -1]), "it has indices below 0 or above 4294967295"),
        (np.array([0, 2**32]), "it has indices below 0 or above 4294967295"),
    ],
)
def test_what_a_stream_cannot_hold_is_an_error(array, why, tmp_path):
    with pytest.raises(FileError, match=f"--format stream cannot hold a/b: {why}"):
        write("stream", tmp_path, [("a/b", array)])


def test_a_stream_has_one_type(tmp_path):
    items = [("a", np.zeros(1, np.uint16)), ("b", np.zeros(1, np.uint32))]
    with pytest.raises(FileError, match="cannot hold b: it is uint32, and the items before it are uint16"):
        write("stream", tmp_path, items)


@pytest.mark.parametrize("form", FORMATS)
def test_odd_keys(form, tmp_path):
    items = [(key, np.full((2, 3), i, np.uint16)) for i, key in enumerate(KEYS)]
    write(form, tmp_path / "out", items)
    read = READ[form](tmp_path / "out")
    same({key: read[key] for key in KEYS}, items)
    assert len(read) == len(items)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/a",
        "a/",
        "a//b",
        ".",
        "a/..",
        "../a",
        "a/./b",
        "a\\b",
        "a\0",
        "a\nb",
        "a\x7f",
        "y" * 201,
        "ü" * 101,
        "\ud800",
    ],
)
@pytest.mark.parametrize("form", FORMATS)
def test_a_key_that_is_no_path_below_the_folder_is_an_error(form, key, tmp_path):
    shard = writer_of(form).shard(tmp_path, 0, {})
    with pytest.raises(FileError, match="the key"):
        shard.place(key, (1,), np.dtype(np.uint16))
    shard.abandon()
    assert list(tmp_path.iterdir()) == []


def test_a_sample_s_name_has_no_dot_in_its_last_part_and_tells_the_key():
    keys = ["a", "a.b/c.d", ".a", "a.", "%", "%2E", "%252E", "a%2Eb.c"]
    for key in keys:
        assert "." not in sample_of(key).rpartition("/")[2]
        assert key_of(sample_of(key)) == key
    assert sample_of("a.b/c") == "a.b/c"


@pytest.mark.parametrize(
    "shape", [(), (0,), (2, 0), (0, 3), (1,), (1, 1, 1, 1), (2, 3, 4, 5), (200_000,), (1000, 1001)]
)
@pytest.mark.parametrize("form", FORMATS)
def test_odd_shapes(form, shape, tmp_path):
    items = [("a", array_of(shape, np.uint16)), ("b", array_of(shape, np.uint16, seed=1))]
    if form == "parquet" and 0 in shape[:-1]:
        with pytest.raises(FileError, match="lists without elements have no shape"):
            write(form, tmp_path / "out", items)
    else:
        write(form, tmp_path / "out", items)
        same(READ[form](tmp_path / "out"), items)


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "parquet"])
def test_items_may_differ_in_shape_and_number_of_axes(form, tmp_path):
    items = [(f"k{i}", array_of(shape, np.uint16)) for i, shape in enumerate([(4,), (1, 2), (), (2, 3, 4), (0, 3)])]
    write(form, tmp_path / "out", items)
    same(READ[form](tmp_path / "out"), items)


def test_parquet_has_one_number_of_axes_and_any_lengths(tmp_path):
    items = [(f"k{i}", array_of(shape, np.uint16)) for i, shape in enumerate([(4, 1), (1, 0), (2, 9)])]
    write("parquet", tmp_path / "out", items)
    same(read_parquet(tmp_path / "out"), items)
    with pytest.raises(FileError, match="cannot hold c: it is uint16 of 1 axes, and those before it uint16 of 2"):
        write("parquet", tmp_path / "out", [*items, ("c", np.zeros(2, np.uint16))])


@pytest.mark.parametrize("form", FORMATS)
def test_a_shard_without_items(form, tmp_path):
    written = write(form, tmp_path / "out", [])
    assert len(written) == {"npy": 0, "stream": 2}.get(form, 1)
    if form == "parquet":
        assert pq.read_table(tmp_path / "out").num_rows == 0
    elif form == "tar":
        with tarfile.open(tmp_path / "out/shard-00000.tar") as archive:
            assert archive.getmembers() == []
    else:
        assert READ[form](tmp_path / "out") == {}


def test_the_metadata_is_where_a_reader_of_the_format_finds_it(tmp_path):
    items = [("a", np.zeros(2, np.uint16))]
    for form in FORMATS:
        write(form, tmp_path, items)
    with zipfile.ZipFile(tmp_path / "shard-00000.npz") as archive:
        assert json.loads(archive.comment) == METADATA
    with safe_open(tmp_path / "shard-00000.safetensors", "numpy") as file:
        assert file.metadata() == METADATA
    with tarfile.open(tmp_path / "shard-00000.tar") as archive:
        assert json.loads(archive.pax_headers["comment"]) == METADATA
    schema = pq.read_schema(tmp_path / "shard-00000.parquet")
    assert {name: schema.metadata[name.encode()].decode() for name in METADATA} == METADATA
    assert TokenStream(tmp_path / "shard-00000.bin").metadata == METADATA


FIELDS = {
    "txt": b"a cat",
    "cls": b"3",
    "jpg": b"\xff\xd8",
    "caption": "a dog, ü",
    "label": 7,
    "score": 0.5,
    "good": True,
    "none": None,
    "tags": ["x", "y"],
    "box": np.array([1.5, 2.0]),
    "image": {"bytes": b"\x89PNG", "path": "dir/x.PNG"},
    "Odd/Name": {"deep": [{"b": b"z"}]},
    "indices.npy": b"of another codebook",
}


def test_webdataset_decodes_the_fields(tmp_path):
    write("tar", tmp_path, [("a/b.c", np.arange(3, dtype=np.uint16), FIELDS), ("a/d", np.zeros(1, np.uint16))])
    first, second = samples_of(tmp_path)
    box = first.pop("box.npy")
    assert (box == [1.5, 2.0]).all()
    assert first.pop("indices.npy").tolist() == [0, 1, 2]
    assert {name: value for name, value in first.items() if not name.startswith("__")} == {
        "txt": "a cat",
        "cls": 3,
        "jpg": b"\xff\xd8",
        "caption.txt": "a dog, ü",
        "label.cls": 7,
        "score.json": 0.5,
        "good.json": True,
        "tags.json": ["x", "y"],
        "image.png": b"\x89PNG",
        "odd_name.json": {"deep": [{"b": "eg=="}]},
    }
    assert (first["__key__"], second["__key__"]) == ("a/b%2Ec", "a/d")


def test_a_tar_has_no_times_and_no_users(tmp_path):
    write("tar", tmp_path, [("k", np.zeros(2, np.uint16), {"txt": b"x"})])
    with tarfile.open(tmp_path / "shard-00000.tar") as archive:
        members = archive.getmembers()
    assert [member.name for member in members] == ["k.indices.npy", "k.txt"]
    assert {(each.mtime, each.uid, each.gid, each.uname, each.gname, each.mode) for each in members} == {
        (0, 0, 0, "", "", 0o644)
    }


def test_parquet_fields_are_columns(tmp_path):
    write(
        "parquet",
        tmp_path,
        [("a", np.arange(4, dtype=np.uint16).reshape(2, 2), FIELDS), ("b", np.ones((1, 2), np.uint16))],
    )
    frame = pd.read_parquet(tmp_path / "shard-00000.parquet")
    assert list(frame) == ["key", "indices", *FIELDS]
    row = frame.iloc[0]
    assert np.stack(row["indices"]).tolist() == [[0, 1], [2, 3]]
    assert (row["txt"], row["cls"], row["caption"], row["label"]) == ("a cat", "3", "a dog, ü", 7)
    assert (row["jpg"], row["score"], row["good"], row["none"]) == (b"\xff\xd8", 0.5, True, None)
    assert (row["tags"].tolist(), row["box"].tolist(), row["image"]) == (["x", "y"], [1.5, 2.0], FIELDS["image"])
    assert frame.iloc[1][["txt", "caption", "image"]].isna().all()


def test_a_field_of_the_name_of_another_column_gets_an_underscore(tmp_path):
    rows = [("a", np.zeros(1, np.uint16), {"key": "a", "indices": 1}), ("b", np.zeros(1, np.uint16), {"key": "b"})]
    write("parquet", tmp_path, rows)
    assert pq.read_schema(tmp_path / "shard-00000.parquet").names == ["key", "indices", "indices_"]
    write("parquet", tmp_path, [*rows, ("c", np.zeros(1, np.uint16), {"key": "another"})])
    table = pq.read_table(tmp_path / "shard-00000.parquet")
    assert table["key_"].to_pylist() == ["a", "b", "another"]


def test_datasets_reads_parquet_and_tar(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    items = [(f"k{i}", array_of((2, 3), np.uint16, i), {"caption": f"no {i}"}) for i in range(5)]
    for form in ("parquet", "tar"):
        write(form, tmp_path, items)
    files = str(tmp_path / "shard-*.parquet")
    table = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    for row, (key, array, fields) in zip(table.with_format("numpy"), items, strict=True):
        assert (row["key"], row["caption"]) == (key, fields["caption"])
        assert (np.asarray(row["indices"]) == array).all()
    files = str(tmp_path / "shard-*.tar")
    rows = datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    for row, (key, array, fields) in zip(rows, items, strict=True):
        assert (row["__key__"], row["caption.txt"]) == (key, fields["caption"])
        assert (np.asarray(row["indices.npy"]) == array).all()


def test_parquet_items_with_other_fields_later_widen_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr("vqserve_data.writers.parquet._GROUP_ROWS", 2)
    fields = [{}, {"a": None}, {"a": 1}, {"b": "x"}, {"a": 2.5}, {"b": "y", "c": {"d": 1}}, {"c": {"e": 2}}]
    items = [(f"k{i}", np.full((1, 2), i, np.uint16), each) for i, each in enumerate(fields)]
    write("parquet", tmp_path, items)
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00000.parquet"]
    same(read_parquet(tmp_path), items)
    rows = pq.read_table(tmp_path).to_pylist()
    assert [row["a"] for row in rows] == [None, None, 1, None, 2.5, None, None]
    assert [row["b"] for row in rows] == [None, None, None, "x", None, "y", None]
    assert [row["c"] for row in rows[-2:]] == [{"d": 1, "e": None}, {"d": None, "e": 2}]
    assert pq.read_schema(tmp_path / "shard-00000.parquet").metadata[b"codebook"] == b"demo"


@pytest.mark.parametrize("rows", [1, 10])
def test_parquet_fields_of_no_common_type_are_an_error(rows, tmp_path, monkeypatch):
    monkeypatch.setattr("vqserve_data.writers.parquet._GROUP_ROWS", rows)
    items = [(f"k{i}", np.zeros(1, np.uint16), {"a": value}) for i, value in enumerate(["x", 1, 2])]
    with pytest.raises(FileError, match=r"--format parquet cannot hold the .*: they are not of one type"):
        write("parquet", tmp_path, items)


def test_names_that_numpy_cannot_tell_apart_are_an_error(tmp_path):
    for keys in itertools.permutations(["a", "a.npy"]):
        with pytest.raises(FileError, match="numpy would take it for"):
            write("npz", tmp_path, [(key, np.zeros(1, np.uint16)) for key in keys])


def test_safetensors_names_are_unique(tmp_path):
    for keys in (["a", "a"], ["__metadata__"]):
        with pytest.raises(FileError, match="the name is taken"):
            write("safetensors", tmp_path, [(key, np.zeros(1, np.uint16)) for key in keys])


def test_a_writer_of_your_own(tmp_path, monkeypatch):
    class Mine(type(writer_of("npz"))):
        name = "mine"

    monkeypatch.setattr("vqserve_data.writers._writers", {"npz": writer_of("npz")})
    with pytest.raises(FileError, match="there is no format 'mine': there are npz"):
        writer_of("mine")
    add_writer(Mine())
    [written] = write("mine", tmp_path, [("a", np.zeros(1, np.uint16))])
    assert written.name == "shard-00000.mine"
    assert np.load(io.BytesIO((tmp_path / written.name).read_bytes()))["a"] == 0
