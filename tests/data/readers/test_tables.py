"""Rows of Parquet and Arrow, as pyarrow, pandas and datasets write them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather, ipc, parquet

from vqserve_data.errors import FileError
from vqserve_data.items import BadItem, RawItem

Write = Callable[[Any, Path], None]


def write_parquet(table: Any, path: Path) -> None:
    parquet.write_table(table, path, row_group_size=3)


def write_stream(table: Any, path: Path) -> None:
    with ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table, max_chunksize=3)


def write_file(table: Any, path: Path) -> None:
    with ipc.new_file(path, table.schema) as file:
        file.write_table(table, max_chunksize=3)


def write_feather(table: Any, path: Path) -> None:
    feather.write_feather(table, path, compression="zstd", chunksize=3)


FORMATS = pytest.mark.parametrize(
    ("write", "suffix"),
    [(write_parquet, "parquet"), (write_stream, "arrow"), (write_file, "arrow"), (write_feather, "feather")],
    ids=["parquet", "stream", "file", "feather"],
)


def nested(kind: Any, depth: int, make: Callable[[Any], Any]) -> Any:
    for _ in range(depth):
        kind = make(kind)
    return kind


@FORMATS
@pytest.mark.parametrize("make", [pa.list_, pa.large_list], ids=["list", "large list"])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("element", ["float32", "float64", "int64", "uint16", "float16"])
def test_lists_of_lists(
    tmp_path: Path, files: Any, same: Any, draw: Any, write: Write, suffix: str, make: Any, depth: int, element: str
) -> None:
    """Rows of different shapes, over several batches."""
    arrays = [abs(draw(*(2 + (row + axis) % 3 for axis in range(depth)), seed=row)).astype(element) for row in range(7)]
    column = pa.array([array.tolist() for array in arrays], nested(pa.from_numpy_dtype(np.dtype(element)), depth, make))
    write(pa.table({"latents": column, "id": list(range(7))}), tmp_path / f"t.{suffix}")
    same(files(tmp_path).arrays(), {f"t/{row:08}": array for row, array in enumerate(arrays)})
    assert [item.fields for item in files(tmp_path).read(5)] == [{"id": 5}, {"id": 6}]


@FORMATS
def test_fixed_sizes(tmp_path: Path, files: Any, same: Any, draw: Any, write: Write, suffix: str) -> None:
    array = draw(7, 2, 3)
    kind = pa.list_(pa.list_(pa.float32(), 3), 2)
    write(pa.table({"x": pa.array(array.tolist(), kind)}), tmp_path / f"t.{suffix}")
    same(files(tmp_path).arrays(), {f"t/{row:08}": array[row] for row in range(7)})
    assert {entry.shape for entry in files(tmp_path).entries()} == {(2, 3)}
    assert {entry.dtype for entry in files(tmp_path).entries()} == {np.dtype(np.float32)}


@FORMATS
@pytest.mark.parametrize("order", [None, [2, 0, 1]])
def test_tensors(
    tmp_path: Path, files: Any, same: Any, draw: Any, write: Write, suffix: str, order: list[int] | None
) -> None:
    array = draw(7, 2, 3, 4)
    kind = pa.fixed_shape_tensor(pa.float32(), (2, 3, 4), permutation=order)
    storage = pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), 24)
    write(pa.table({"x": pa.ExtensionArray.from_storage(kind, storage)}), tmp_path / f"t.{suffix}")
    found = files(tmp_path).arrays()
    same(found, {f"t/{row:08}": array[row].transpose(order or [0, 1, 2]) for row in range(7)})


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_arrays_of_datasets(tmp_path: Path, files: Any, same: Any, draw: Any, suffix: str) -> None:
    datasets = pytest.importorskip("datasets")
    arrays = draw(5, 4, 3, 2)
    features = datasets.Features(
        {
            "latents": datasets.Array3D((4, 3, 2), "float32"),
            "caption": datasets.Value("string"),
            "key": datasets.Value("string"),
        }
    )
    rows = {
        "latents": list(arrays),
        "caption": [f"c{row}" for row in range(5)],
        "key": [f"k/{row}" for row in range(5)],
    }
    dataset = datasets.Dataset.from_dict(rows, features)
    if suffix == "parquet":
        dataset.to_parquet(tmp_path / "data.parquet")
    else:
        dataset.save_to_disk(tmp_path, num_shards=1)
    stem = "data" if suffix == "parquet" else "data-00000-of-00001"
    same(files(tmp_path, key="key").arrays(), {f"{stem}/k/{row}": arrays[row] for row in range(5)})
    assert files(tmp_path).read()[2].fields == {"caption": "c2", "key": "k/2"}


def test_tables_of_pandas(tmp_path: Path, files: Any, same: Any, draw: Any) -> None:
    pandas = pytest.importorskip("pandas")
    arrays = [draw(row + 1, seed=row) for row in range(4)]
    frame = pandas.DataFrame({"latents": arrays, "label": [1, 2, 3, 4], "text": list("abcd")}, index=[5, 6, 7, 8])
    frame.to_parquet(tmp_path / "a.parquet")
    frame.reset_index(drop=True).to_feather(tmp_path / "b.feather")
    expected = {f"{stem}/{row:08}": array for stem in "ab" for row, array in enumerate(arrays)}
    same(files(tmp_path).arrays(), expected)


@FORMATS
def test_bad_rows_leave_the_others(tmp_path: Path, files: Any, write: Write, suffix: str) -> None:
    rows = [[[1.0, 2.0], [3.0, 4.0]], [[1.0], [2.0, 3.0]], None, [[1.0, None]], [None, [1.0]], [], [[5.0]]]
    text = pa.array([b"a", b"b", b"c", b"d", b"e", b"\xff", b"g"]).view(pa.string())
    write(pa.table({"x": pa.array(rows, pa.list_(pa.list_(pa.float32()))), "text": text}), tmp_path / f"t.{suffix}")
    bad = files(tmp_path).bad()
    assert {int(key[-1]): reason.split()[-1] for key, reason in bad.items() if not key.endswith("5")} == {
        1: "lengths", 2: "null", 3: "null", 4: "null",
    }  # fmt: skip
    assert list(bad) == [f"t/{row:08}" for row in (1, 2, 3, 4, 5)]
    good = [item for item in files(tmp_path, fields=False).read() if not isinstance(item, BadItem)]
    assert [item.array.shape for item in good] == [(2, 2), (0, 0), (1, 1)]
    for start in range(8):
        assert (
            files(tmp_path, fields=False).read(start)[:1] == [] or files(tmp_path).read(start)[0].key == f"t/{start:08}"
        )


@FORMATS
def test_keys_of_a_column(tmp_path: Path, files: Any, write: Write, suffix: str) -> None:
    table = pa.table({"x": [[1.0]] * 7, "id": ["a", "b/c", "../d", "", None, "e\n", "f"], "n": list(range(7))})
    write(table, tmp_path / f"t.{suffix}")
    records = files(tmp_path, key="id").read()
    assert [record.key for record in records if not isinstance(record, BadItem)] == ["t/a", "t/b/c", "t/f"]
    assert [record.key for record in records if isinstance(record, BadItem)] == [f"t/{row:08}" for row in (2, 3, 4, 5)]
    assert [entry.key for entry in files(tmp_path, key="id").entries()] == [record.key for record in records]
    assert list(files(tmp_path, key="n").arrays()) == [f"t/{row}" for row in range(7)]


@FORMATS
def test_columns_that_do_not_fit(tmp_path: Path, files: Any, write: Write, suffix: str) -> None:
    write(pa.table({"x": [[1.0]], "y": [[2]], "z": ["text"], "w": [["t"]]}), tmp_path / f"t.{suffix}")
    for select, text in (
        ({}, "several columns have lists of numbers: name one with --column; it has x"),
        ({"column": "none"}, "no column 'none'; it has x"),
        ({"column": "w"}, "column 'w' has no lists of numbers"),
        ({"column": "x", "key": "none"}, "no column 'none'"),
    ):
        for call in (files(tmp_path, **select).read, files(tmp_path, **select).entries):
            with pytest.raises(FileError, match=text):
                call()
    [item] = files(tmp_path, column="y").read()
    assert item.array.tolist() == [2]
    assert item.fields["z"] == "text"
    assert item.fields["x"].tolist() == [1.0]
    write(pa.table({"z": ["text"]}), tmp_path / f"t.{suffix}")
    with pytest.raises(FileError, match="no column has lists of numbers"):
        files(tmp_path).read()


@FORMATS
def test_raw_rows(tmp_path: Path, files: Any, write: Write, suffix: str) -> None:
    write(pa.table({"image": [{"bytes": b"x", "path": None}], "label": [3], "id": ["k"]}), tmp_path / f"t.{suffix}")
    [item] = files(tmp_path, raw=True, key="id").read()
    assert item == RawItem("t/k", item.source, {"image": {"bytes": b"x", "path": None}, "label": 3, "id": "k"})


@FORMATS
def test_columns_that_are_not_wanted_are_not_read(tmp_path: Path, files: Any, write: Write, suffix: str) -> None:
    write(pa.table({"x": [[1.0]] * 4, "text": pa.array([b"\xff"] * 4).view(pa.string())}), tmp_path / f"t.{suffix}")
    assert len(files(tmp_path, fields=False).arrays()) == 4


@FORMATS
def test_slices_and_empty_tables(tmp_path: Path, files: Any, same: Any, draw: Any, write: Write, suffix: str) -> None:
    array = draw(9, 2, 2)
    table = pa.table({"x": pa.array(array.tolist(), pa.list_(pa.list_(pa.float32(), 2)))}).slice(2, 5)
    write(table, tmp_path / f"t.{suffix}")
    same(files(tmp_path).arrays(), {f"t/{row:08}": array[row + 2] for row in range(5)})
    write(table.slice(0, 0), tmp_path / f"t.{suffix}")
    assert files(tmp_path).read() == []


def test_groups_of_rows_that_claim_too_much_are_refused(tmp_path: Path, files: Any) -> None:
    """Equal numbers pack to almost nothing: a small file could ask for all memory."""
    column = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(20_000_000, np.float32)), 20_000_000)
    parquet.write_table(pa.table({"x": column}), tmp_path / "t.parquet")
    assert (tmp_path / "t.parquet").stat().st_size < 20_000
    [reason] = files(tmp_path).bad().values()
    assert "more than numbers can be packed" in reason


def test_a_damaged_group_of_rows_leaves_the_others(tmp_path: Path, files: Any, draw: Any) -> None:
    array = draw(9, 200)
    write_parquet(pa.table({"x": array.tolist()}), tmp_path / "t.parquet")
    data = bytearray((tmp_path / "t.parquet").read_bytes())
    place = parquet.ParquetFile(tmp_path / "t.parquet").metadata.row_group(1).column(0).data_page_offset
    data[place : place + 40] = bytes(40)
    (tmp_path / "t.parquet").write_bytes(data)
    records = files(tmp_path).read()
    assert [isinstance(record, BadItem) for record in records] == [False] * 3 + [True] * 3 + [False] * 3
    assert [record.key for record in records] == [f"t/{row:08}" for row in range(9)]
    assert [record.key for record in files(tmp_path).read(4)] == [f"t/{row:08}" for row in range(4, 9)]


@FORMATS
@pytest.mark.long
def test_damaged_tables(tmp_path: Path, draw: Any, damaged: Any, write: Write, suffix: str) -> None:
    path = tmp_path / f"t.{suffix}"
    write(pa.table({"x": pa.array(draw(4, 2, 2).tolist(), pa.list_(pa.list_(pa.float32()))), "s": list("abcd")}), path)
    reasons = damaged(path, cuts=150, flips=500)
    assert not any("MemoryError" in reason for reason in reasons), reasons


@pytest.mark.long
def test_a_footer_that_contradicts_itself_does_not_end_the_process(tmp_path: Path, draw: Any) -> None:
    """pyarrow aborts where it is asked for the size statistics of such a file; here it runs in a process of its own."""
    table = pa.table({"x": pa.array(draw(4, 2, 2).tolist(), pa.list_(pa.list_(pa.float32())))})
    parquet.write_table(table, tmp_path / "t.parquet")
    data = bytearray((tmp_path / "t.parquet").read_bytes())
    length = int.from_bytes(data[-8:-4], "little")
    code = """
import sys
import numpy as np
from vqserve_data.errors import FileError
from vqserve_data.readers import Selection, reader_of
from vqserve_data.sources import find
[path, length] = sys.argv[1:]
whole = open(path, "rb").read()
for place in range(len(whole) - 8 - int(length), len(whole) - 8):
    for value in ((whole[place] + 16) % 256, whole[place] ^ 1):
        open(path, "wb").write(whole[:place] + bytes([value]) + whole[place + 1 :])
        [file] = find([path]).files
        try:
            list(reader_of(file).read(file, Selection()))
        except FileError:
            pass
print("alive")
"""
    arguments = [sys.executable, "-c", code, str(tmp_path / "t.parquet"), str(length)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.stdout == "alive\n", done.stderr
