"""What is loaded at start and at a rescan, what stays, and what the log says."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vqserve_server import repository as repository_module
from vqserve_server.codebooks import load_codebook, save_codebook
from vqserve_server.errors import CodebookError, CodebookFileError
from vqserve_server.repository import ReloadCounts, Repository
from vqserve_server.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that the repository has read, by stem."""
    read: list[str] = []

    def load(path: Path) -> Any:
        read.append(path.stem)
        return load_codebook(path)

    monkeypatch.setattr(repository_module, "load_codebook", load)
    return read


def loaded(*sources: Path) -> Repository:
    made = Repository([str(source) for source in sources], device="cpu")
    made.load()
    return made


def served(of: Repository) -> dict[str, str]:
    return {tokenizer.name: tokenizer.digest for tokenizer in of.tokenizers}


def warnings(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.levelno >= logging.WARNING]


def test_skipped_files_are_not_rejected(tmp_path: Path, put: Callable[..., Any]) -> None:
    put(tmp_path / "book" / "1.safetensors")
    repo = loaded(tmp_path)
    put(tmp_path / "book" / "v2.safetensors")
    (tmp_path / "codes.npy").touch()
    tally = repo.reload()
    assert tally == ReloadCounts(loaded=0, unchanged=1, skipped=2)


def test_a_reload_adds_new_files_and_drops_deleted_ones(
    tmp_path: Path, put: Callable[..., Any], log: pytest.LogCaptureFixture
) -> None:
    same, old = put(tmp_path / "same.safetensors"), put(tmp_path / "book" / "1.safetensors", seed=1)
    put(tmp_path / "gone.safetensors", seed=2)
    repo = loaded(tmp_path)
    before = {tokenizer.name: tokenizer for tokenizer in repo.tokenizers}
    assert list(before) == ["book@1", "gone", "same"]
    new = put(tmp_path / "book" / "2.safetensors", seed=3)
    (tmp_path / "gone.safetensors").unlink()
    log.clear()
    assert repo.reload() == ReloadCounts(loaded=1, unchanged=2, removed=1)
    assert served(repo) == {"book@1": old.digest, "book@2": new.digest, "same": same.digest}
    after = {tokenizer.name: tokenizer for tokenizer in repo.tokenizers}
    assert after["same"] is before["same"]
    assert after["book@1"] is before["book@1"]
    assert sorted(record.getMessage() for record in log.records) == [
        f'codebook_loaded name=book@2 kind=vq size="40 x 4" search={new.search} device=cpu digest={new.digest[:12]}',
        "codebook_removed name=gone",
        f"codebook_version name=book now=book@2 was=book@1 digest={new.digest[:12]}",
    ]


def test_a_new_latest_version_is_logged(tmp_path: Path, put: Callable[..., Any], log: pytest.LogCaptureFixture) -> None:
    def rescanned() -> list[str]:
        log.clear()
        repo.reload()
        return [text for record in log.records if "codebook_version" in (text := record.getMessage())]

    digests = {version: put(tmp_path / f"img/{version}.safetensors", seed=version).digest[:12] for version in (9, 10)}
    put(tmp_path / "other/1.safetensors", seed=3)
    repo = loaded(tmp_path)
    assert rescanned() == []
    (tmp_path / "img/10.safetensors").rename(tmp_path / "aside")
    assert rescanned() == [f"codebook_version name=img now=img@9 was=img@10 digest={digests[9]}"]
    put(tmp_path / "img/8.safetensors", seed=8)
    assert rescanned() == []
    (tmp_path / "aside").rename(tmp_path / "img/10.safetensors")
    assert rescanned() == [f"codebook_version name=img now=img@10 was=img@9 digest={digests[10]}"]
    shutil.rmtree(tmp_path / "img")
    assert rescanned() == []


def test_a_folder_whose_last_version_was_deleted_is_skipped(
    tmp_path: Path, put: Callable[..., Any], log: pytest.LogCaptureFixture
) -> None:
    put(tmp_path / "img" / "1.safetensors")
    put(tmp_path / "other.safetensors", seed=1)
    repo = loaded(tmp_path)
    (tmp_path / "img" / "1.safetensors").unlink()
    assert repo.reload() == ReloadCounts(unchanged=1, removed=1, skipped=1)
    assert list(served(repo)) == ["other"]
    assert warnings(log) == [f'codebook_skipped problem="{tmp_path / "img"} is skipped: it has no file N.safetensors"']


def test_a_file_that_was_not_touched_is_not_read(
    tmp_path: Path, put: Callable[..., Any], reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "a.safetensors")
    put(tmp_path / "b.safetensors")
    monkeypatch.setattr(repository_module, "CLOCK_S", 0.0)
    repo = loaded(tmp_path)
    assert reads == ["a", "b"]
    assert repo.reload() == ReloadCounts(unchanged=2)
    assert reads == ["a", "b"]
    put(tmp_path / "b.safetensors", seed=1)
    assert repo.reload() == ReloadCounts(loaded=1, unchanged=1)
    assert reads == ["a", "b", "b"]


def test_a_file_that_was_touched_just_now_is_read_again(
    tmp_path: Path, put: Callable[..., Any], reads: list[str]
) -> None:
    """Written twice within a tick of the file system's clock it may have the same size, times and even inode."""
    put(tmp_path / "a.safetensors")
    repo = loaded(tmp_path)
    [before] = repo.tokenizers
    assert repo.reload() == ReloadCounts(unchanged=1)
    assert reads == ["a", "a"]
    assert repo.tokenizers == [before]


def test_the_same_codebook_in_another_file_is_not_prepared_again(tmp_path: Path, put: Callable[..., Any]) -> None:
    path = tmp_path / "a.safetensors"
    put(path)
    repo = loaded(tmp_path)
    [before] = repo.tokenizers
    quantizer = load_codebook(path).quantizer
    save_codebook(quantizer, path, provenance={"saved": "again"})
    assert repo.reload() == ReloadCounts(unchanged=1)
    assert repo.tokenizers == [before]
    # The default layout is part of what is served, and so of the digest.
    quantizer.layout = "channels_first"
    save_codebook(quantizer, path)
    assert repo.reload() == ReloadCounts(loaded=1)
    [after] = repo.tokenizers
    assert (after.digest != before.digest, str(after.info.layout)) == (True, "channels_first")


def truncated(whole: bytes) -> list[bytes]:
    return [whole[:length] for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1)]


def damaged(whole: bytes) -> list[bytes]:
    flipped = bytearray(whole)
    flipped[-5] ^= 0x40
    return [bytes(flipped), whole + b"\0", bytes(len(whole)), b"\x80\x04." + whole]


@pytest.mark.parametrize("spoil", [truncated, damaged])
def test_a_file_that_is_not_whole_is_never_served(
    tmp_path: Path, put: Callable[..., Any], log: pytest.LogCaptureFixture, spoil: Callable[[bytes], list[bytes]]
) -> None:
    path = tmp_path / "book.safetensors"
    put(path, seed=1)
    new_bytes = path.read_bytes()
    old = put(path)
    repo = loaded(tmp_path)
    before = repo.tokenizers
    for content in spoil(new_bytes):
        # Both as a copy that goes on and as one that has ended so.
        path.write_bytes(content)
        (tmp_path / "other.safetensors").write_bytes(content)
        log.clear()
        assert repo.reload() == ReloadCounts(rejected=2)
        assert repo.tokenizers == before
        first, second = warnings(log)
        assert first.startswith(
            f'codebook_rejected name=book path={path} kept={old.digest[:12]} error="the codebook cannot '
        )
        assert second.startswith(
            f"codebook_rejected name=other path={tmp_path / 'other.safetensors'} kept=nothing error="
        )
        assert "\n" not in first + second
    path.write_bytes(new_bytes)
    (tmp_path / "other.safetensors").unlink()
    assert repo.reload() == ReloadCounts(loaded=1)
    assert served(repo) == {"book": load_codebook(path).digest}


def test_a_damaged_version_leaves_the_one_before_it_the_latest(tmp_path: Path, put: Callable[..., Any]) -> None:
    one = put(tmp_path / "book" / "1.safetensors")
    repo = loaded(tmp_path)
    (tmp_path / "book" / "2.safetensors").write_bytes(b"half")
    assert repo.reload() == ReloadCounts(unchanged=1, rejected=1)
    assert served(repo) == {"book@1": one.digest}


def test_at_start_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, put: Callable[..., Any]) -> None:
    put(tmp_path / "good.safetensors")
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "3.safetensors").write_bytes(b"half")
    with pytest.raises(
        CodebookFileError, match=r"book/3\.safetensors: the codebook cannot be used: it is 4 bytes long"
    ):
        loaded(tmp_path)


def test_at_start_what_is_no_codebook_file_is_named_once(tmp_path: Path) -> None:
    np.save(tmp_path / "latents.npy", np.zeros((4, 3), np.float32))
    with pytest.raises(CodebookFileError) as raised:
        loaded(tmp_path / "latents.npy")
    assert str(raised.value).startswith(f"{tmp_path / 'latents.npy'}: it is a .npy file, not a codebook file: `")
    assert raised.value.path == str(tmp_path / "latents.npy")
    (tmp_path / "README.md").write_text("# A text\n\nand more")
    with pytest.raises(CodebookFileError, match=r"README\.md: it is a text file, not a codebook file: name"):
        loaded(tmp_path / "README.md")


def test_a_link_out_of_the_folder_does_not_replace_a_codebook(
    tmp_path: Path, put: Callable[..., Any], log: pytest.LogCaptureFixture
) -> None:
    outside = tmp_path / "outside.safetensors"
    put(outside, seed=9)
    path = tmp_path / "books" / "book.safetensors"
    old = put(path)
    repo = loaded(tmp_path / "books")
    path.unlink()
    path.symlink_to(outside)
    assert repo.reload() == ReloadCounts(rejected=1)
    assert served(repo) == {"book": old.digest}
    [warning] = warnings(log)
    assert warning == (
        f'codebook_skipped problem="{path} is a link to outside its folder: replace it by the file, or name the file '
        '(NAME=PATH)" kept=book'
    )


def test_a_name_of_several_lines_is_one_line_of_the_log(
    tmp_path: Path, put: Callable[..., Any], log: pytest.LogCaptureFixture
) -> None:
    put(tmp_path / "book.safetensors")
    repo = loaded(tmp_path)
    put(tmp_path / "a\nINFO all is well\x1b[2J.safetensors")
    assert repo.reload() == ReloadCounts(unchanged=1, rejected=1)
    [warning] = warnings(log)
    assert "a\\nINFO all is well\\x1b[2J.safetensors: " in warning
    assert warning.isprintable()


def test_a_folder_that_vanishes_keeps_what_came_from_it(
    tmp_path: Path, put: Callable[..., Any], log: pytest.LogCaptureFixture
) -> None:
    digests = {
        "book@1": put(tmp_path / "a" / "book" / "1.safetensors").digest,
        "flat": put(tmp_path / "a" / "flat.safetensors", seed=1).digest,
        "named": put(tmp_path / "named.safetensors", seed=2).digest,
    }
    repo = loaded(tmp_path / "a", tmp_path / "named.safetensors")
    (tmp_path / "a").rename(tmp_path / "elsewhere")
    (tmp_path / "named.safetensors").rename(tmp_path / "aside")
    assert repo.reload() == ReloadCounts(rejected=2)
    assert served(repo) == digests
    assert warnings(log) == [
        f'source_lost problem="no such file or folder: {tmp_path / "a"}" kept=book@1,flat',
        f'source_lost problem="no such file or folder: {tmp_path / "named.safetensors"}" kept=named',
    ]
    (tmp_path / "elsewhere").rename(tmp_path / "a")
    (tmp_path / "aside").rename(tmp_path / "named.safetensors")
    assert repo.reload() == ReloadCounts(unchanged=3)


def test_an_emptied_folder_keeps_what_came_from_it(
    tmp_path: Path, put: Callable[..., Any], log: pytest.LogCaptureFixture
) -> None:
    """An unmounted volume leaves its mount point: a folder without a file."""
    digests = {
        "book@1": put(tmp_path / "a" / "book" / "1.safetensors").digest,
        "flat": put(tmp_path / "a" / "flat.safetensors", seed=1).digest,
        "other": put(tmp_path / "b" / "other.safetensors", seed=2).digest,
    }
    repo = loaded(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a").rename(tmp_path / "elsewhere")
    (tmp_path / "a").mkdir()
    assert repo.reload() == ReloadCounts(unchanged=1, rejected=1)
    assert served(repo) == digests
    problem = f"no *.safetensors file in {tmp_path / 'a'}: put one there, or mount its volume"
    assert warnings(log) == [f'source_lost problem="{problem}" kept=book@1,flat']
    assert [record.levelname for record in log.records if "source_lost" in record.getMessage()] == ["ERROR"]
    # The volume is mounted again, without one of its files.
    (tmp_path / "a").rmdir()
    (tmp_path / "elsewhere").rename(tmp_path / "a")
    (tmp_path / "a" / "flat.safetensors").unlink()
    assert repo.reload() == ReloadCounts(unchanged=2, removed=1)


def test_the_last_codebook_of_a_folder_is_not_dropped(tmp_path: Path, put: Callable[..., Any]) -> None:
    old = put(tmp_path / "book" / "1.safetensors")
    repo = loaded(tmp_path)
    (tmp_path / "book" / "1.safetensors").unlink()
    # The empty folder of versions is skipped.
    assert repo.reload() == ReloadCounts(rejected=1, skipped=1)
    assert served(repo) == {"book@1": old.digest}
    put(tmp_path / "book" / "2.safetensors", seed=1)
    assert repo.reload() == ReloadCounts(loaded=1, removed=1)


def test_a_second_claim_to_a_name_changes_nothing(
    tmp_path: Path, put: Callable[..., Any], log: pytest.LogCaptureFixture
) -> None:
    old = put(tmp_path / "book.safetensors")
    repo = loaded(tmp_path)
    put(tmp_path / "book" / "1.safetensors", seed=1)
    assert repo.reload() == ReloadCounts(rejected=1)
    assert served(repo) == {"book": old.digest}
    assert "two codebooks are named 'book'" in warnings(log)[0]
    assert warnings(log)[0].endswith(" kept=book")
    (tmp_path / "book.safetensors").unlink()
    assert repo.reload() == ReloadCounts(loaded=1, removed=1)
    assert list(served(repo)) == ["book@1"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (CodebookError("code 3 is elsewhere"), "code 3 is elsewhere"),
        (MemoryError("of all\nkinds"), "MemoryError: of all kinds"),
    ],
)
def test_what_fails_its_own_check_is_not_served(
    tmp_path: Path,
    put: Callable[..., Any],
    log: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    reason: str,
) -> None:
    old = put(tmp_path / "book.safetensors")
    repo = loaded(tmp_path)

    def fail(self: Tokenizer) -> None:
        raise error

    monkeypatch.setattr(Tokenizer, "check_itself", fail)
    put(tmp_path / "book.safetensors", seed=1)
    assert repo.reload() == ReloadCounts(rejected=1)
    assert served(repo) == {"book": old.digest}
    assert warnings(log)[0].endswith(f'kept={old.digest[:12]} error="{reason}"')


def test_a_file_may_move_and_become_a_version(
    tmp_path: Path, put: Callable[..., Any], log: pytest.LogCaptureFixture
) -> None:
    book = put(tmp_path / "book.safetensors")
    repo = loaded(tmp_path)
    (tmp_path / "book").mkdir()
    shutil.move(tmp_path / "book.safetensors", tmp_path / "book" / "1.safetensors")
    assert repo.reload() == ReloadCounts(loaded=1, removed=1)
    assert served(repo) == {"book@1": book.digest}
    assert f"codebook_version name=book now=book@1 was=book.safetensors digest={book.digest[:12]}" in log.messages
