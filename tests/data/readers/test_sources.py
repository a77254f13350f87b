"""Arguments become files."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vqserve_data.errors import FileError, MissingLibrary
from vqserve_data.items import BadItem, RawItem
from vqserve_data.readers import SUFFIXES, Selection, add_reader, reader_of, suffix_of
from vqserve_data.sources import LocalFile, find


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "b/2.npy",
        "b/10.npy",
        "b-c/1.npy",
        "a.npy",
        "b/x/deep.npz",
        ".hidden/1.npy",
        "b/.part.npy",
        "b/readme.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "s.zarr").mkdir()
    (tmp_path / "s.zarr" / "zarr.json").write_text("{}")
    return tmp_path


def keys(*arguments: str | Path, **options: Any) -> list[str]:
    return [file.key for file in find([str(argument) for argument in arguments], **options).files]


def test_a_folder_is_sorted_by_the_parts_of_paths(tree: Path) -> None:
    assert keys(tree) == ["a", "b/10", "b/2", "b/x/deep", "b-c/1", "s"]
    assert find([str(tree)]).skipped == [str(tree / "b" / "readme.txt")]


def test_arguments_keep_their_order(tree: Path) -> None:
    assert keys(tree / "b", tree / "a.npy", tree / "s.zarr") == ["10", "2", "x/deep", "a", "s"]
    assert find([str(tree / "s.zarr")]).files[0].size == 2


def test_keys_of_a_glob_are_below_its_fixed_part(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert keys(tree / "b" / "*.npy") == ["10", "2"]
    assert keys(tree / "*" / "*.npy") == ["b/10", "b/2", "b-c/1"]
    assert keys(tree / "**" / "*.np?") == ["a", "b/10", "b/2", "b/x/deep", "b-c/1"]
    assert keys(tree / "b*") == ["b/10", "b/2", "b/x/deep", "b-c/1"]
    assert keys(tree / "**") == ["a", "b/10", "b/2", "b/x/deep", "b-c/1", "s"]
    monkeypatch.chdir(tree / "b")
    assert keys("*.npy") == ["10", "2"]
    assert keys(".") == ["10", "2", "x/deep"]
    assert keys("../a.npy") == ["a"]


def test_a_name_with_the_marks_of_a_pattern_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "a[1].npy").write_bytes(b"")
    assert keys(tmp_path / "a[1].npy") == ["a[1]"]


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("none.npy", "there is no such file"),
        ("*.npz", "matches nothing"),
        ("b/readme.txt", "unknown suffix: the suffixes that are read are .* .npy, .npz"),
        (".hidden2", "has no file that can be read"),
        ("b/*.txt", "has no file that can be read"),
    ],
)
def test_what_names_nothing_is_an_error(tree: Path, argument: str, text: str) -> None:
    (tree / ".hidden2").mkdir()
    with pytest.raises(FileError, match=text):
        find([str(tree / argument)])


def test_two_files_of_one_key_are_an_error(tree: Path) -> None:
    (tree / "a.npz").write_bytes(b"")
    with pytest.raises(FileError, match=r"a\.npy and .*a\.npz have the same key, 'a'"):
        find([str(tree)])
    with pytest.raises(FileError, match=r"10\.npy is named twice"):
        find([str(tree / "b"), str(tree / "b" / "10.npy")])


def test_names_that_cannot_be_keys_are_errors(tmp_path: Path) -> None:
    # A long path is shown as a whole.
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    (folder / "a\nb.npy").write_bytes(b"")
    with pytest.raises(FileError, match=r"a\\nb\.npy.*control character.*rename it"):
        find([str(folder)])


def test_links(tree: Path) -> None:
    """A link to a folder above is not followed for ever; one to nothing is a bad file."""
    (tree / "b" / "loop").symlink_to(tree)
    (tree / "b-c" / "gone.npy").symlink_to(tree / "nowhere")
    (tree / "linked").symlink_to(tree / "b" / "x")
    assert keys(tree) == ["a", "b/10", "b/2", "b/x/deep", "b-c/1", "b-c/gone", "linked/deep", "s"]
    [gone] = find([str(tree / "b-c" / "gone.npy")]).files
    [bad] = reader_of(gone).read(gone, Selection())
    assert "No such file" in bad.reason


def test_pipes_and_folders_that_cannot_be_read(tree: Path) -> None:
    os.mkfifo(tree / "b" / "pipe.npy")
    assert "b/pipe" not in keys(tree)
    with pytest.raises(FileError, match="device or a pipe"):
        find([str(tree / "b" / "pipe.npy")])


def test_a_change_is_noticed(tree: Path) -> None:
    path = tree / "a.npy"
    [file] = find([str(path)]).files
    assert isinstance(file, LocalFile)
    assert not file.changed()
    os.utime(path, ns=(1, 1))
    assert file.changed()
    [store] = find([str(tree / "s.zarr")]).files
    (tree / "s.zarr" / "c").write_bytes(b"1")
    assert store.changed()
    path.unlink()
    assert file.changed()
    assert pickle.loads(pickle.dumps(file)) == file  # noqa: S301


def test_files_of_any_suffix_give_their_bytes(tmp_path: Path) -> None:
    for name in ("1.JPG", "2.tar.xyz", "plain"):
        (tmp_path / name).write_bytes(name.encode())
    found = find([str(tmp_path)], any_suffix=True)
    items = [item for file in found.files for item in reader_of(file).read(file, Selection(raw=True))]
    assert [(item.key, dict(item.fields)) for item in items if isinstance(item, RawItem)] == [
        ("1", {"jpg": b"1.JPG"}),
        ("2.tar", {"xyz": b"2.tar.xyz"}),
        ("plain", {"": b"plain"}),
    ]
    assert [list(reader_of(file).read(file, Selection(raw=True), start=1)) for file in found.files] == [[], [], []]
    with pytest.raises(FileError, match="no reader knows"):
        list(reader_of(found.files[0]).read(found.files[0], Selection()))


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a/b.TAR.GZ", ".tar.gz"),
        ("x.y.npy", ".npy"),
        (".npy", None),
        ("a.npy/b", None),
        ("https://host/a.npy?x=1.zip#y", ".npy"),
        ("https://host.npy/a", None),
        ("zip://b.npz::s3://bucket/c.zip", ".npz"),
        ("simplecache::s3://bucket/c.tar", ".tar"),
        ("s3://bucket/d.zarr/", ".zarr"),
    ],
)
def test_suffixes(name: str, suffix: str | None) -> None:
    assert suffix_of(name) == suffix


def test_the_reader_of_the_documentation(tmp_path: Path) -> None:
    """In a process of its own, because it adds a suffix."""
    page = Path(__file__).parents[3] / "docs" / "formats.md"
    code = page.read_text().partition("```python\n")[2].partition("```")[0]
    code += """
from vqserve_data.readers import Selection, reader_of
from vqserve_data.sources import find

for file in find(["data"]).files:
    for item in reader_of(file).read(file, Selection()):
        print(item.key, item.array.shape)
"""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("1 2 3\n4 5 6\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "a (2, 3)\n"


def test_a_reader_of_ones_own(tmp_path: Path, files: Any) -> None:
    class Reader:
        suffixes = (".numbers",)

        def entries(self, file: Any, select: Any) -> Any:
            raise NotImplementedError

        def read(self, file: Any, select: Any, *, start: int = 0) -> Any:
            from vqserve_data.items import Item  # noqa: PLC0415

            yield Item(file.key, np.loadtxt(file.path), file.name)

    add_reader(Reader())
    (tmp_path / "a.numbers").write_text("1 2 3")
    [item] = files(tmp_path).read()
    assert item.key == "a"
    assert item.array.tolist() == [1, 2, 3]
    assert ".numbers" in SUFFIXES


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("a.parquet", "pyarrow", "arrow"),
        ("a.arrow", "pyarrow", "arrow"),
        ("a.h5", "h5py", "hdf5"),
        ("a.zarr", "zarr", "zarr"),
        ("memory://a.npy", "fsspec", "url"),
    ],
)
def test_a_missing_library_is_named(
    tmp_path: Path, files: Any, monkeypatch: pytest.MonkeyPatch, name: str, module: str, extra: str
) -> None:
    for known in [known for known in sys.modules if known.partition(".")[0] == module]:
        monkeypatch.setitem(sys.modules, known, None)
    monkeypatch.setitem(sys.modules, module, None)
    if "://" not in name:
        (tmp_path / name).write_bytes(b"")
        name = str(tmp_path / name)
    for method in ("read", "entries"):
        with pytest.raises(MissingLibrary, match=rf"pip install 'vqserve\[{extra}\]'"):
            getattr(files(name), method)()


@pytest.mark.parametrize("suffix", sorted(set(SUFFIXES) - {".zarr"}))
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"x")
    (file,) = find([str(tmp_path)]).files
    path.unlink()
    os.mkfifo(path)
    assert file.changed()
    (item,) = reader_of(file).read(file, Selection())
    assert isinstance(item, BadItem)
    assert "it is no file" in item.reason
    with pytest.raises(FileError, match="it is no file"):
        list(reader_of(file).entries(file, Selection()))


def test_keys_have_a_length_that_a_path_can_have(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{"/".join(["x" * 190] * 12): np.zeros(2), "b": np.zeros(2)})
    (file,) = find([str(tmp_path)]).files
    bad, good = reader_of(file).read(file, Selection())
    assert isinstance(bad, BadItem)
    assert bad.reason == "the name of the member has more than 2000 bytes"
    assert good.key == "a/b"


def test_a_link_to_itself_is_a_bad_item(tmp_path: Path) -> None:
    (tmp_path / "a.npy").symlink_to("a.npy")
    np.save(tmp_path / "b.npy", np.zeros(2))
    first, second = find([str(tmp_path)]).files
    (bad,) = reader_of(first).read(first, Selection())
    assert isinstance(bad, BadItem)
    assert second.key == "b"


def test_file_urls_are_paths(tree: Path) -> None:
    assert keys(f"file://{tree}") == keys(tree)
    assert isinstance(find([f"file://{tree}/a.npy"]).files[0], LocalFile)
