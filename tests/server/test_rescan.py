"""`--rescan-seconds`: files are looked at without a signal, and one that is still being copied is left alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.waiting import eventually, read_until
from vqserve_client import Client
from vqserve_server.rescan import Rescan


class Folder:
    """A folder, and the looks at it, a minute later than now."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.now = time.time() + 60
        monkeypatch.setattr("vqserve_server.rescan.time.time", lambda: self.now)
        self.rescan = Rescan([str(path)], 1.0)

    def write(self, name: str, content: bytes) -> None:
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    (tmp_path / "a.safetensors").write_bytes(b"a")
    return Folder(tmp_path, monkeypatch)


def test_nothing_is_reported_where_nothing_changes(folder: Folder) -> None:
    assert not any(folder.rescan.has_changed() for _ in range(5))


def test_a_change_is_reported_once_two_looks_see_the_same(folder: Folder) -> None:
    (folder.path / "b.safetensors").write_bytes(b"b")
    assert [folder.rescan.has_changed() for _ in range(4)] == [False, True, False, False]
    (folder.path / "b.safetensors").unlink()
    assert [folder.rescan.has_changed() for _ in range(4)] == [False, True, False, False]


def test_a_file_that_grows_is_left_alone(folder: Folder) -> None:
    for size in range(1, 6):
        (folder.path / "b.safetensors").write_bytes(b"b" * size)
        assert not folder.rescan.has_changed()
    assert folder.rescan.has_changed()


def test_a_file_that_changed_just_now_is_left_alone(folder: Folder) -> None:
    (folder.path / "b.safetensors").write_bytes(b"b")
    written = (folder.path / "b.safetensors").stat().st_ctime
    folder.now = written + 0.5
    assert [folder.rescan.has_changed() for _ in range(3)] == [False, False, False]
    folder.now = written + 2.5
    assert folder.rescan.has_changed()


def test_files_of_a_clock_that_is_ahead_are_not_left_alone_for_ever(folder: Folder) -> None:
    path = folder.path / "b.safetensors"
    path.write_bytes(b"b")
    os.utime(path, (folder.now + 3600, folder.now + 3600))
    assert [folder.rescan.has_changed() for _ in range(2)] == [False, True]


def test_a_moved_label_and_a_new_problem_are_changes(folder: Folder) -> None:
    for version in (1, 2):
        folder.write(f"book/{version}.safetensors", b"x")
    link = folder.path / "book" / "stable.safetensors"
    link.symlink_to("1.safetensors")
    assert [folder.rescan.has_changed() for _ in range(2)] == [False, True]
    for target in ("2.safetensors", "missing"):
        link.unlink()
        link.symlink_to(target)
        assert [folder.rescan.has_changed() for _ in range(3)] == [False, True, False]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_server_finds_new_files_itself(
    vqserved: Callable[..., Any], put: Callable[..., Any], tmp_path: Path, workers: int
) -> None:
    old = put(tmp_path / "book.safetensors")
    daemon = vqserved(tmp_path, "--device", "cpu", "--workers", workers, "--rescan-seconds", 1)
    new = put(tmp_path / ".new" / "book.safetensors", seed=1)
    content = (tmp_path / ".new" / "book.safetensors").read_bytes()
    # As a copy that stopped halfway.
    (tmp_path / "book.safetensors").write_bytes(content[: len(content) // 2])
    read_until(daemon.process.stderr, " codebook_rejected ")
    with Client(daemon.target) as client:
        assert client.codebooks()[0].digest == old.digest
    (tmp_path / "book.safetensors").write_bytes(content)

    def digests() -> set[str]:
        found = set()
        for _ in range(8):
            with Client(daemon.target) as client:
                found |= {info.digest for info in client.codebooks()}
        return found

    eventually(lambda: digests() == {new.digest})
    code, log = daemon.stop(signal.SIGTERM)
    assert code == 0
    # One reload for each change, and none where nothing has changed.
    assert log.count(" reload_done ") <= 2 * workers
