"""Files behind URLs: in memory, in an archive, and on an HTTP server."""

from __future__ import annotations

import functools
import http.server
import io
import pickle
import re
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import h5py
import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy
import zarr
from pyarrow import feather, parquet

from vqserve_data import remote
from vqserve_data.errors import FileError
from vqserve_data.items import BadItem, Item, RawItem
from vqserve_data.readers import Selection, reader_of
from vqserve_data.sources import RemoteFile, find


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files, in parts if it is asked to, with a tag of their content."""

    protocol_version = "HTTP/1.1"
    gives_parts = True

    def log_message(self, *args: Any) -> None:
        pass

    def send_head(self) -> Any:
        path = Path(self.translate_path(self.path.partition("?")[0]))
        if not path.is_file():
            return super().send_head()
        data = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.gives_parts else None
        start, stop = (int(wanted[1]), min(int(wanted[2] or len(data)) + 1, len(data))) if wanted else (0, len(data))
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        if self.gives_parts:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hash(data)}"')
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        return io.BytesIO(data[start:stop])


class WholeHandler(Handler):
    """Gives whole files only."""

    gives_parts = False


@pytest.fixture(params=[Handler, WholeHandler], ids=["parts", "whole"])
def url(request: pytest.FixtureRequest, tree: Path) -> Iterator[str]:
    """The URL of a server of `tree`."""
    pytest.importorskip("aiohttp")
    handler = functools.partial(request.param, directory=str(tree))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def tree(tmp_path: Path, draw: Any) -> Path:
    """A file of each format; their arrays are the same."""
    root = tmp_path / "tree"
    root.mkdir()
    array = draw(6, 4)
    np.save(root / "npy.npy", array)
    np.savez(root / "npz.npz", x=array)
    safetensors.numpy.save_file({"x": array}, root / "st.safetensors")
    parquet.write_table(pa.table({"x": [array.tolist()]}), root / "parquet.parquet")
    feather.write_feather(pa.table({"x": [array.tolist()]}), root / "feather.feather")
    with h5py.File(root / "h5.h5", "w") as file:
        file.create_dataset("x", data=array, chunks=(2, 2))
    with tarfile.open(root / "tar.tar", "w") as tar:
        tar.add(root / "npy.npy", "sample.npy")
    zarr.open_group(root / "zarr2.zarr", mode="w", zarr_format=2).create_array("x", data=array)
    zarr.consolidate_metadata(str(root / "zarr2.zarr"))
    zarr.save_array(root / "zarr3.zarr", array, zarr_format=3)
    return root


KEYS = [
    "feather/00000000", "h5/x", "npy", "npz/x", "parquet/00000000", "st/x", "tar/sample", "zarr2/x", "zarr3",
]  # fmt: skip


@pytest.fixture
def memory(tree: Path) -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    fs.put(f"{tree}/", "/data/", recursive=True)
    yield "memory://data"
    fs.rm("/data", recursive=True)


def test_a_folder_in_memory(memory: str, files: Any, draw: Any) -> None:
    for argument in (memory, f"{memory}/", f"{memory}/*"):
        found = files(argument).arrays()
        assert list(found) == KEYS
        for key, array in found.items():
            np.testing.assert_array_equal(array, draw(6, 4), err_msg=key)
    assert files(memory).files[2].name == "memory:///data/npy.npy"
    assert list(files(f"{memory}/n*").arrays()) == ["npy", "npz/x"]


def test_single_files_in_memory(memory: str, files: Any, draw: Any) -> None:
    for name in ("npy.npy", "zarr2.zarr", "zarr3.zarr/", "h5.h5"):
        [array] = files(f"{memory}/{name}").arrays().values()
        np.testing.assert_array_equal(array, draw(6, 4), err_msg=name)


def test_large_arrays_are_read_by_parts(memory: str, files: Any, draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("handle", "hdf5", "zarr", "npz", "torch"):
        monkeypatch.setattr(f"vqserve_data.readers.{module}.WHOLE_BYTES", 0)
    for item in files(memory).read():
        np.testing.assert_array_equal(item.array[2:5, 1:3], draw(6, 4)[2:5, 1:3], err_msg=item.key)


def test_a_file_over_http(url: str, tree: Path, files: Any, draw: Any) -> None:
    for name in ("npy.npy", "npz.npz", "st.safetensors", "parquet.parquet", "feather.feather", "h5.h5", "tar.tar"):
        [array] = files(f"{url}/{name}?token=a.b").arrays().values()
        np.testing.assert_array_equal(array, draw(6, 4), err_msg=name)
    (file,) = files(f"{url}/npy.npy?token=a.b").files
    # Records and errors have the name: it has no signature in it.
    assert (file.name, file.key) == (f"{url}/npy.npy", "npy")


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://me:secret@host/a.npy?X-Signature=1#part", "https://host/a.npy"),
        ("s3://bucket/a?b@c.npy", "s3://bucket/a?b@c.npy"),
        ("zip://a.npy::https://me:secret@host/b.zip?sig=1", "zip://a.npy::https://host/b.zip"),
        ("simplecache::s3://bucket/a.npy", "simplecache::s3://bucket/a.npy"),
    ],
)
def test_a_name_has_no_secrets(url: str, name: str) -> None:
    assert remote.without_secrets(url) == name


def test_an_empty_file_over_http_is_a_bad_item(url: str, tree: Path, files: Any) -> None:
    (tree / "empty.npy").write_bytes(b"")
    [record] = files(f"{url}/empty.npy").read()
    assert isinstance(record, BadItem)
    assert record.reason == "it is empty"


def test_stores_and_folders_over_http(url: str, files: Any, draw: Any) -> None:
    for name in ("zarr2.zarr", "zarr3.zarr"):
        [array] = files(f"{url}/{name}").arrays().values()
        np.testing.assert_array_equal(array, draw(6, 4), err_msg=name)
    assert list(files(f"{url}/").arrays()) == KEYS


def test_a_change_is_noticed(url: str, tree: Path) -> None:
    [file] = find([f"{url}/npy.npy"]).files
    assert not file.changed()
    (tree / "npy.npy").write_bytes(bytes((tree / "npy.npy").stat().st_size))
    assert file.changed()
    (tree / "npy.npy").unlink()
    assert file.changed()


def test_a_change_in_memory_is_noticed(memory: str) -> None:
    fs = fsspec.filesystem("memory")
    by_folder = {file.key: file for file in find([memory]).files}
    alone = find([f"{memory}/{name}" for name in ("npy.npy", "zarr3.zarr")]).files
    assert [file.version for file in alone] == [by_folder["npy"].version, by_folder["zarr3"].version]
    for file in alone:
        assert not file.changed()
    fs.pipe("/data/npy.npy", b"other")
    fs.pipe("/data/zarr3.zarr/c/0/0", b"other")
    for file in alone:
        assert file.changed()
    again: Any = pickle.loads(pickle.dumps(alone[0]))  # noqa: S301
    assert isinstance(again, RemoteFile)
    assert again.open().read() == b"other"


def test_a_chain_of_urls(tree: Path, tmp_path: Path, files: Any, draw: Any) -> None:
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(tree / "npy.npy", "sub/npy.npy")
        archive.write(tree / "npz.npz", "npz.npz")
    inside = f"zip://::file://{tmp_path}/all.zip"
    found = files(inside)
    assert list(found.arrays()) == ["npz/x", "sub/npy"]
    assert found.files[1].name == f"zip://sub/npy.npy::file://{tmp_path}/all.zip"
    [item] = files(found.files[1].name).read()
    np.testing.assert_array_equal(item.array, draw(6, 4))


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("memory://none/a.npy", "there is no such file"),
        ("memory://none", "there is no such file"),
        ("memory://data/*.none", "has no file that can be read"),
        ("nothing://data/a.npy", "Protocol not known: nothing"),
        ("http://127.0.0.1:1/a.npy", "cannot read http://127.0.0.1:1/a.npy"),
    ],
)
def test_what_names_nothing_is_an_error(memory: str, argument: str, text: str) -> None:
    with pytest.raises(FileError, match=text):
        find([argument])


def test_a_store_that_fails_gives_bad_items(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its errors can be of any type."""
    found = find([memory]).files

    class Unreachable(Exception):
        pass

    def fail(*args: Any, **options: Any) -> Any:
        raise Unreachable("no answer")

    fs = fsspec.filesystem("memory")
    for name in ("open", "_open", "cat_file", "info", "ls", "find"):
        monkeypatch.setattr(type(fs), name, fail)
    records = [record for file in found for record in reader_of(file).read(file, Selection())]
    assert [record.key for record in records] == [file.key for file in found]
    assert all(isinstance(record, BadItem) for record in records)
    with pytest.raises(FileError, match="no answer"):
        found[0].changed()


def test_blocks_are_read_ahead(memory: str, files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays across several blocks."""
    monkeypatch.setattr(remote, "_BLOCK_BYTES", 1 << 16)
    array = np.random.default_rng(0).standard_normal((300, 300))
    buffer = io.BytesIO()
    np.save(buffer, array)
    fsspec.filesystem("memory").pipe("/data/big.npy", buffer.getvalue())
    [item] = files(f"{memory}/big.npy").read()
    assert isinstance(item, Item)
    np.testing.assert_array_equal(item.array, array)


def test_files_of_any_suffix(memory: str) -> None:
    fsspec.filesystem("memory").pipe("/data/sub/a.JPG", b"picture")
    [file] = find([f"{memory}/sub"], any_suffix=True).files
    [item] = reader_of(file).read(file, Selection(raw=True))
    assert item == RawItem("a", "memory:///data/sub/a.JPG", {"jpg": b"picture"})
    with pytest.raises(FileError, match="has no file that can be read"):
        find([f"{memory}/sub"])
    with pytest.raises(FileError, match="unknown suffix"):
        find([f"{memory}/sub/a.JPG"])
