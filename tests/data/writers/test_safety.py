"""What is under its own name is complete: after a kill, on a full disk, after an error; and it is always the same."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vqserve_data.drafts import Draft, drafts_below, publish, write_file
from vqserve_data.errors import FileError
from vqserve_data.files import new_array
from vqserve_data.writers import FORMATS, writer_of

# What this process and the children that are killed both run.
PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from vqserve_data.writers import writer_of

def write_shard(form, folder, number, side=64):
    shard = writer_of(form).shard(Path(folder), number, {"digest": "ab" * 32, "codebook": "demo"})
    try:
        for i in range(20):
            # The first one is large enough to be mapped.
            key, shape = f"{number:05}/{i % 3}/{i:03}", (8, 1024 if i == 0 else side, side)
            array = shard.place(key, shape, np.dtype(np.uint16))
            array[...] = (np.arange(array.size).reshape(shape) * (i + 1) + number) % 65521
            shard.add(key, array, {"txt": f"no {i}".encode(), "label": i})
        return shard.close()
    except BaseException:
        shard.abandon()
        raise
"""
LOOP = f"""{PROGRAM}
for number in range(1000):
    write_shard(sys.argv[1], sys.argv[2], number)
    print(number, flush=True)
"""
names = {"__name__": "program"}
exec(PROGRAM, names)  # noqa: S102
write_shard = names["write_shard"]


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_items_give_the_same_bytes(form, tmp_path, monkeypatch):
    folders = [tmp_path / "a", tmp_path / "b"]
    written = []
    for folder, now, user in zip(folders, (1e9, 2e9), ("one", "two"), strict=True):
        folder.mkdir()
        monkeypatch.setattr(time, "time", lambda now=now: now)
        monkeypatch.setenv("USER", user)
        old = os.umask(0o077 if user == "two" else 0o022)
        try:
            written.append(write_shard(form, folder, 3))
        finally:
            os.umask(old)
    assert written[0] == written[1]
    first, second = map(files_of, folders)
    assert list(first) != []
    assert {name: path.read_bytes() for name, path in first.items()} == {
        name: path.read_bytes() for name, path in second.items()
    }
    assert {each.name: (each.nbytes, each.sha256) for each in written[0]} == {
        name: (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()) for name, path in first.items()
    }


@pytest.mark.parametrize("form", FORMATS)
def test_a_killed_process_leaves_drafts_only(form, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    out.mkdir()
    whole.mkdir()
    moments = random.Random(form)
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", LOOP, form, str(out)], stdout=subprocess.PIPE, text=True)
        number = int(child.stdout.readline())
        time.sleep(moments.uniform(0, 0.2))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        assert number == 0
        drafts = set(drafts_below(out))
        for path in files_of(out).values():
            if path in drafts:
                continue
            relative = path.relative_to(out)
            shard = int(relative.parts[0] if form == "npy" else relative.name.split("-")[1].split(".")[0])
            if not (whole / relative).exists():
                write_shard(form, whole, shard)
            assert path.read_bytes() == (whole / relative).read_bytes(), relative
    # What is left is no hindrance: the same shard again gives the same bytes.
    [first, *_] = write_shard(form, out, 0)
    assert (out / first.name).read_bytes() == (whole / first.name).read_bytes()


FULL = f"""{PROGRAM}
import resource
from vqserve_data.errors import FileError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    write_shard(sys.argv[1], sys.argv[2], 0)
except FileError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [0, 1000, 900_000])
@pytest.mark.parametrize("form", FORMATS)
def test_a_file_that_cannot_grow_is_an_error_that_leaves_nothing(form, limit, tmp_path):
    # Its limit on the size of files does to a process what a full disk does.
    ended = subprocess.run(
        [sys.executable, "-c", FULL, form, str(tmp_path), str(limit)], capture_output=True, text=True, check=False
    )
    assert ended.stderr == ""
    assert ended.stdout.startswith(f"cannot write {tmp_path}/")
    assert os.strerror(errno.EFBIG) in ended.stdout
    assert list(tmp_path.iterdir()) == []


class FullDisk(io.FileIO):
    """A file on a disk that is full after some bytes."""

    left = 0

    def write(self, data):
        if len(data) > FullDisk.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        FullDisk.left -= len(data)
        return super().write(data)


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "npy"])
def test_a_disk_that_is_full_at_any_moment(form, tmp_path, monkeypatch):
    """Each write fails once: of the items, of what ends the file, and of what is still in a buffer."""

    def opened(draft):
        return io.BufferedRandom(FullDisk(draft.file, "w+"), 1 << 16)

    monkeypatch.setattr(Draft, "open", opened)
    failures = []
    for room in range(0, 4_000_000, 150_000):
        FullDisk.left = room
        try:
            write_shard(form, tmp_path, 0, side=16)
        except FileError as error:
            failures.append((str(error), list(tmp_path.iterdir())))
        else:
            break
    assert len(failures) > 2
    for text, left in failures:
        assert text.startswith(f"cannot write {tmp_path}/shard-00000.")
        assert "No space left on device" in text
        assert left == []
    assert list(tmp_path.iterdir()) != []
    assert list(drafts_below(tmp_path)) == []


def test_an_item_that_is_placed_and_not_added_is_not_written(tmp_path):
    shard = writer_of("npy").shard(tmp_path, 0, {})
    large = shard.place("lost/large", (1 << 20,), np.dtype(np.uint16))
    assert isinstance(large, np.memmap)
    shard.add("kept", shard.place("kept", (2,), np.dtype(np.uint16)), {})
    assert [each.name for each in shard.close()] == ["kept.npy"]
    assert list(files_of(tmp_path)) == ["kept.npy"]


def test_abandoned_items_leave_no_folders_but_those_of_others(tmp_path):
    (tmp_path / "old").mkdir()
    shard = writer_of("npy").shard(tmp_path, 0, {})
    for key in ("old/a", "new/deep/b", "used/c"):
        shard.add(key, shard.place(key, (2,), np.dtype(np.uint16)), {})
    (tmp_path / "used/theirs").write_text("")
    shard.abandon()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["old", "theirs", "used"]


def test_a_link_that_leads_out_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    out = tmp_path / "out"
    out.mkdir()
    (out / "link").symlink_to(tmp_path / "elsewhere")
    (out / "inside").mkdir()
    (out / "good").symlink_to("inside")
    shard = writer_of("npy").shard(out, 0, {})
    for key in ("link/a", "link/b/c"):
        with pytest.raises(FileError, match=r"link is a link that leads out of .*/out"):
            shard.place(key, (2,), np.dtype(np.uint16))
    shard.add("good/a", shard.place("good/a", (2,), np.dtype(np.uint16)), {})
    shard.close()
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert (out / "inside/a.npy").exists()


def test_a_key_below_the_file_of_another_is_an_error(tmp_path):
    shard = writer_of("npy").shard(tmp_path, 0, {})
    shard.add("a", shard.place("a", (2,), np.dtype(np.uint16)), {})
    shard.close()
    shard = writer_of("npy").shard(tmp_path, 1, {})
    with pytest.raises(FileError, match=r"cannot write .*a\.npy: File exists"):
        shard.place("a.npy/b", (2,), np.dtype(np.uint16))


def test_two_items_of_one_shard_with_one_key_are_an_error(tmp_path):
    shard = writer_of("npy").shard(tmp_path, 0, {})
    shard.place("a", (2,), np.dtype(np.uint16))
    with pytest.raises(FileError, match="two items have the key a"):
        shard.place("a", (2,), np.dtype(np.uint16))


def test_drafts_get_their_names_all_or_none(tmp_path):
    drafts = [Draft.of(tmp_path / name) for name in ("a", "b")]
    for draft in drafts:
        draft.open().close()
    drafts[1].path.mkdir()
    with pytest.raises(FileError, match=r"cannot write .*/b: "):
        publish(drafts)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_drafts_that_several_processes_write_have_names_of_their_own(tmp_path):
    path = tmp_path / "a.npy"
    with new_array(path, (2,), np.dtype(np.uint16), force=False) as first:
        with new_array(path, (2,), np.dtype(np.uint16), force=True) as second:
            assert len(list(drafts_below(tmp_path))) == 2
            second[:] = 2
        first[:] = 1
        path.unlink()
    assert np.load(path).tolist() == [1, 1]
    assert list(tmp_path.iterdir()) == [path]


def test_a_shard_of_many_files_holds_none_open(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 64, hard))
    try:
        shard = writer_of("npy").shard(tmp_path, 0, {})
        for i in range(1_000):
            shard.add(f"{i}", shard.place(f"{i}", (2,), np.dtype(np.uint16)), {})
        assert len(shard.close()) == 1_000
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_draft_that_cannot_be_removed_is_no_second_error(tmp_path):
    draft = Draft.of(tmp_path / "a")
    draft.file.mkdir()
    draft.remove()
    assert draft.file.is_dir()
    assert list(drafts_below(tmp_path)) == []


def test_a_file_is_replaced_as_a_whole_or_stays(tmp_path, monkeypatch):
    path = tmp_path / "manifest.json"
    write_file(path, [b"one ", b"two"])
    assert path.read_bytes() == b"one two"

    def opened(draft):
        return io.BufferedRandom(FullDisk(draft.file, "w+"), 1 << 16)

    FullDisk.left = 3
    monkeypatch.setattr(Draft, "open", opened)
    with pytest.raises(FileError, match=r"cannot write .*manifest\.json: No space left on device"):
        write_file(path, [b"three"])
    assert path.read_bytes() == b"one two"
    assert list(tmp_path.iterdir()) == [path]
