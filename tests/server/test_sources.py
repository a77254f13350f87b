"""Which files are served under which names, and which are rejected."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vqserve_server.codebook_files import DEMO_PATH, Found, Label, find_codebooks, version_order
from vqserve_server.errors import StartError


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def texts(found: Found, *, is_fatal: bool = True) -> list[str]:
    return [problem.text for problem in found.problems if problem.is_fatal is is_fatal]


def test_no_source_is_the_demo() -> None:
    assert find_codebooks([]) == Found({"demo": DEMO_PATH}, [])


def test_files_folders_and_names_in_order(tmp_path: Path) -> None:
    books = tmp_path / "books"
    touch(books / "b.safetensors", books / "a.v2.safetensors", books / "readme.txt", tmp_path / "one.safetensors")
    touch(tmp_path / "x=y.safetensors")
    found = find_codebooks([f"mine={tmp_path / 'one.safetensors'}", str(books), str(tmp_path / "x=y.safetensors")])
    assert list(found.files.items())[:3] == [
        ("mine", tmp_path / "one.safetensors"),
        ("a.v2", books / "a.v2.safetensors"),
        ("b", books / "b.safetensors"),
    ]
    # A path that exists is a path, though it has a sign of equality; its stem is no name.
    assert len(texts(found)) == 1
    assert "'x=y' is not a valid name" in texts(found)[0]


def test_versions_are_numbers(tmp_path: Path) -> None:
    touch(*(tmp_path / "book" / f"{version}.safetensors" for version in (10, 9, 1, 123456789012345678)))
    found = find_codebooks([str(tmp_path)])
    found.check()
    assert list(found.files) == ["book@1", "book@9", "book@10", "book@123456789012345678"]
    assert found.files["book@9"] == tmp_path / "book" / "9.safetensors"


@pytest.mark.parametrize("name", ["0", "007", "v3", "1.2", "-1", "1 ", "³", "latest", "1234567890123456789"])
def test_files_that_are_no_versions_are_skipped_with_a_warning(tmp_path: Path, name: str) -> None:
    touch(
        tmp_path / "book" / "3.safetensors", tmp_path / "book" / f"{name}.safetensors", tmp_path / "book" / "notes.txt"
    )
    found = find_codebooks([str(tmp_path)])
    found.check()
    assert list(found.files) == ["book@3"]
    [text] = texts(found, is_fatal=False)
    assert f"{name}.safetensors is skipped" in text


def test_files_that_begin_with_a_dot_are_skipped(tmp_path: Path) -> None:
    touch(tmp_path / ".draft.safetensors", tmp_path / "..data" / "1.safetensors", tmp_path / "book" / ".9.safetensors")
    touch(tmp_path / "book" / "1.safetensors")
    assert find_codebooks([str(tmp_path)]) == Found({"book@1": tmp_path / "book" / "1.safetensors"}, [])


def test_a_folder_without_versions_is_skipped_with_a_warning(tmp_path: Path) -> None:
    touch(tmp_path / "book.safetensors", tmp_path / "sub" / "deep" / "1.safetensors", tmp_path / "notes" / "a.txt")
    # The file of this folder is reported already.
    touch(tmp_path / "named" / "v3.safetensors")
    found = find_codebooks([str(tmp_path)])
    found.check()
    assert list(found.files) == ["book"]
    texts_of = {name: f"{tmp_path / name} is skipped: it has no file N.safetensors" for name in ("notes", "sub")}
    named, *others = texts(found, is_fatal=False)
    assert named.startswith(f"{tmp_path / 'named' / 'v3.safetensors'} is skipped: ")
    assert others == list(texts_of.values())


def test_a_name_can_be_claimed_once(tmp_path: Path) -> None:
    touch(tmp_path / "book.safetensors", tmp_path / "book" / "1.safetensors", tmp_path / "other.safetensors")
    found = find_codebooks([str(tmp_path)])
    assert list(found.files) == ["other"]
    assert texts(found) == [
        f"two codebooks are named 'book': {tmp_path / 'book'} and {tmp_path / 'book.safetensors'}; rename one"
    ]
    assert found.problems[0].paths == (tmp_path / "book", tmp_path / "book.safetensors")
    with pytest.raises(StartError, match="two codebooks are named"):
        found.check()


def test_a_checkpoint_among_codebooks_is_reported(tmp_path: Path) -> None:
    touch(tmp_path / "book.safetensors", tmp_path / "codes.npy", tmp_path / "vqgan.ckpt", tmp_path / "README.md")
    found = find_codebooks([str(tmp_path)])
    assert list(found.files) == ["book"]
    assert texts(found) == []
    assert texts(found, is_fatal=False) == [
        f"{tmp_path / name} is skipped: it is not a *.safetensors file; `vqserved import` makes one from it"
        for name in ("codes.npy", "vqgan.ckpt")
    ]


def test_links_inside_a_folder_are_followed(tmp_path: Path) -> None:
    # As a Kubernetes ConfigMap is mounted: names link to a hidden folder, which is swapped as a whole.
    touch(tmp_path / "..2031" / "book.safetensors", tmp_path / "..2031" / "many" / "1.safetensors")
    (tmp_path / "..data").symlink_to("..2031")
    (tmp_path / "book.safetensors").symlink_to("..data/book.safetensors")
    (tmp_path / "many").symlink_to("..data/many")
    found = find_codebooks([str(tmp_path)])
    found.check()
    assert list(found.files) == ["book", "many@1"]


def test_a_folder_may_be_named_by_a_link(tmp_path: Path) -> None:
    touch(tmp_path / "v7" / "book.safetensors")
    (tmp_path / "current").symlink_to("v7")
    assert list(find_codebooks([str(tmp_path / "current")]).files) == ["book"]


@pytest.mark.parametrize(
    "target", ["../outside.safetensors", "{absolute}", "../nowhere.safetensors", "book.safetensors"]
)
@pytest.mark.parametrize("link", ["book.safetensors", "book/3.safetensors"])
def test_links_out_of_a_folder_are_rejected(tmp_path: Path, link: str, target: str) -> None:
    outside = tmp_path / "outside.safetensors"
    touch(outside)
    folder = tmp_path / "books"
    touch(folder / "good.safetensors")
    path = folder / link
    path.parent.mkdir(exist_ok=True)
    if path.parent != folder:
        target = {"book.safetensors": "3.safetensors"}.get(target, f"../{target}")
    path.symlink_to(target.replace("../{absolute}", "{absolute}").format(absolute=outside))
    found = find_codebooks([str(folder)])
    assert list(found.files) == ["good"]
    assert texts(found) == [
        f"{path} is a link to outside its folder: replace it by the file, or name the file (NAME=PATH)"
    ]
    # If the command line names the link itself, it counts as the file.
    if path.exists():
        assert find_codebooks([f"mine={path}"]).files == {"mine": path}


def test_a_folder_that_is_a_link_out_is_rejected(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere" / "1.safetensors")
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "book").symlink_to("../elsewhere")
    found = find_codebooks([str(tmp_path / "books")])
    assert found.files == {}
    assert "is a link to outside its folder" in texts(found)[0]


@pytest.mark.parametrize("name", ["..", "../up", "a/b", ".hidden", "", "book@3", "a" * 129, "a\nb"])
def test_names_that_are_none(tmp_path: Path, name: str) -> None:
    file = tmp_path / "file.safetensors"
    touch(file)
    found = find_codebooks([f"{name}={file}"])
    if name:
        assert found.files == {}
        assert f"{name!r} is not a valid name" in texts(found)[0]
    else:
        assert list(found.files) == ["file"]


def test_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    found = find_codebooks([str(tmp_path / "none"), str(tmp_path / "empty")])
    assert texts(found) == [
        f"no such file or folder: {tmp_path / 'none'}",
        f"no *.safetensors file in {tmp_path / 'empty'}: put one there, or mount its volume",
    ]
    # What was loaded from there stays: an unmounted volume is gone, or leaves an empty folder.
    assert [problem.paths for problem in found.problems] == [(tmp_path / "none",), (tmp_path / "empty",)]
    assert [problem.is_lost for problem in found.problems] == [True, True]


def test_a_folder_of_versions_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "book.safetensors")
    (tmp_path / "lost+found").mkdir()
    listed = Path.iterdir

    # Raised by the test: root, which many CI systems use, may list a folder of any mode.
    def reject(path: Path) -> object:
        if path.name == "lost+found":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", reject)
    found = find_codebooks([str(tmp_path)])
    found.check()
    assert list(found.files) == ["book"]
    assert f"cannot read the folder {tmp_path / 'lost+found'}: Permission denied" in texts(found, is_fatal=False)[0]


def test_a_link_to_a_version_is_a_label_of_it(tmp_path: Path) -> None:
    touch(tmp_path / "book" / "3.safetensors", tmp_path / "book" / "10.safetensors")
    link = tmp_path / "book" / "stable.safetensors"
    link.symlink_to("3.safetensors")
    # A link to a label means the same version.
    (tmp_path / "book" / "canary.safetensors").symlink_to("stable.safetensors")
    found = find_codebooks([str(tmp_path)])
    found.check()
    assert list(found.files) == ["book@3", "book@10"]
    assert found.labels["book@stable"] == Label(link, "book@3")
    assert found.labels["book@canary"].version == "book@3"
    assert found.problems == []


@pytest.mark.parametrize("target", ["4.safetensors", "../other.safetensors", "notes.safetensors", "stable.safetensors"])
def test_a_label_of_no_version_is_an_error(tmp_path: Path, target: str) -> None:
    touch(tmp_path / "book" / "3.safetensors", tmp_path / "other.safetensors")
    link = tmp_path / "book" / "stable.safetensors"
    link.symlink_to(target)
    found = find_codebooks([str(tmp_path)])
    assert list(found.files) == ["book@3", "other"]
    [text] = texts(found)
    assert text.startswith(f"{link} is a label, and so must be a link to a version beside it, such as 3.safetensors")
    assert f", not to {target}; `ln -sfn" in text


def test_links_whose_names_look_like_versions_are_no_labels(tmp_path: Path) -> None:
    touch(tmp_path / "book" / "3.safetensors")
    for name in ("03", "-x", "@"):
        (tmp_path / "book" / f"{name}.safetensors").symlink_to("3.safetensors")
    found = find_codebooks([str(tmp_path)])
    assert (list(found.files), found.labels) == (["book@3"], {})
    assert len(texts(found, is_fatal=False)) == 3


def test_a_version_may_be_a_link_and_have_a_label(tmp_path: Path) -> None:
    # As a mounted ConfigMap has it.
    touch(tmp_path / "book" / "..data" / "3.safetensors")
    (tmp_path / "book" / "3.safetensors").symlink_to("..data/3.safetensors")
    (tmp_path / "book" / "stable.safetensors").symlink_to("3.safetensors")
    assert find_codebooks([str(tmp_path)]).labels["book@stable"].version == "book@3"


def test_names_are_ordered_by_version_after_their_labels() -> None:
    names = ["a@10", "b", "a@stable", "a@9", "a", "a@canary"]
    assert sorted(names, key=version_order) == ["a", "a@canary", "a@stable", "a@9", "a@10", "b"]
