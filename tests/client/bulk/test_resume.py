"""A job that ends early, however: the next run goes on, or says why it cannot, and the bytes are the same."""

from __future__ import annotations

import random
import resource
import shutil
import signal
import time

import numpy as np
import pytest

from support.trees import tree
from support.waiting import eventually
from vqserve_client import bulk
from vqserve_client.bulk import JobOptions
from vqserve_client.bulk.dataset import DataSet
from vqserve_client.bulk.records import read_manifest

OPTIONS = ("--format", "npz", "--shard-items", 3, "--no-progress")


@pytest.fixture
def many(tmp_path):
    """More items than are done in a moment: 400 files, one of them with a NaN."""
    folder = tmp_path / "many"
    folder.mkdir()
    generator = np.random.default_rng(1)
    for number in range(400):
        latents = generator.standard_normal((1, 4, 16, 16)).astype(np.float32)
        if number == 111:
            latents[0, 1, 2, 3] = np.nan
        np.save(folder / f"{number:03}.npy", latents)
    return folder


@pytest.fixture
def whole(vqserve, many, tmp_path):
    """What a run that is not disturbed writes."""
    assert vqserve("encode", many, "-o", tmp_path / "whole", *OPTIONS)[0] == 3
    return tree(tmp_path / "whole")


@pytest.mark.parametrize("seed", range(4))
def test_a_job_that_is_killed_goes_on(start, vqserve, many, whole, tmp_path, seed, request):
    out = tmp_path / "tokens"
    chance = random.Random(seed)
    for _ in range(request.config.getoption("--job-kills") // 4):
        process = start("encode", many, "-o", out, *OPTIONS)
        # In the first moments, or soon after some more parts.
        more = chance.randrange(10)
        _wait_for(process, out, _parts(out) + more)
        time.sleep(chance.random() * (0.02 if more else 1.0))
        process.kill()
        process.communicate()
    assert vqserve("encode", many, "-o", out, *OPTIONS)[0] == 3
    assert tree(out) == whole
    # Once more: nothing is left to do.
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.npz")}
    assert vqserve("encode", many, "-o", out, *OPTIONS)[0] == 3
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.npz")} == before


def _wait_for(process, out, parts):
    eventually(lambda: process.poll() is not None or _parts(out) >= parts)


def _parts(out):
    return len(list((out / "manifest").glob("part-*"))) if out.exists() else 0


def test_ctrl_c_says_how_to_go_on(start, vqserve, many, whole, tmp_path):
    out = tmp_path / "tokens"
    process = start("encode", many, "-o", out, *OPTIONS)
    eventually(lambda: _parts(out) >= 2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    if process.returncode != 3:  # It may have been at its end.
        assert process.returncode == 130
        assert said == f"vqserve: stopped: what is whole is in {out}; the same command goes on from there\n"
        assert not list(out.rglob(".*.part"))
    assert vqserve("encode", many, "-o", out, *OPTIONS)[0] == 3
    assert tree(out) == whole


def test_a_reader_of_the_progress_that_goes(start, vqserve, many, whole, tmp_path):
    out = tmp_path / "tokens"
    process = start("encode", many, "-o", out, *OPTIONS, "--json")
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == 1
    assert said == ""
    assert tree(out) == whole


def test_a_full_disk(start, vqserve, source, tmp_path):
    out = tmp_path / "tokens"
    np.save(source / "z.npy", np.zeros((8, 4, 100, 100), np.float32))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    process = start("encode", source, "-o", out, *OPTIONS, preexec_fn=limit)
    _, said = process.communicate()
    assert process.returncode == 1
    assert "File too large" in said
    assert str(out) in said
    assert not list(out.rglob(".*.part"))
    assert vqserve("encode", source, "-o", out, *OPTIONS)[0] == 0
    assert vqserve("encode", source, "-o", tmp_path / "whole", *OPTIONS)[0] == 0
    assert tree(out) == tree(tmp_path / "whole")


def test_the_server_goes(client, server, many, tmp_path):
    out = tmp_path / "tokens"
    options = JobOptions(format="npz", limits=bulk.Limits(shard_items=3))
    real = client.encode_many

    def broken(arrays, **fields):
        for number, result in enumerate(real(arrays, **fields)):
            if number == 10:
                server.stop()
            yield result

    client.encode_many = broken
    with pytest.raises((bulk.FileError, ConnectionError)):
        bulk.encode(client, [str(many)], out, options)
    assert not read_manifest(out)["complete"]
    assert not list(out.rglob(".*.part"))


def test_the_command_says_how_to_go_on_after_its_server_has_gone(start, server, many, tmp_path):
    out = tmp_path / "tokens"
    process = start("encode", many, "-o", out, *OPTIONS, "--retries", 0)
    eventually(lambda: process.poll() is not None or _parts(out) >= 1)
    process.send_signal(signal.SIGSTOP)
    server.stop()
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate()
    if process.returncode != 3:  # It may have been at its end.
        assert process.returncode == 1
        assert "; the same command goes on where it was (server" in said
        assert "array " not in said


def test_another_codebook_is_refused(vqserve, serving, put, monkeypatch, source, tmp_path, book):
    out = tmp_path / "tokens"
    vqserve("encode", source, "-o", out)
    other = serving(put(tmp_path / "other" / "small.safetensors", seed=1, num_codes=300))
    monkeypatch.setenv("VQSERVE_TARGET", other.target)
    before = tree(out)
    code, _, said = vqserve("encode", source, "-o", out)
    assert code == 1
    assert book.info.digest in said
    assert tree(out) == before
    assert vqserve("encode", source, "-o", out, "--force")[0] == 0
    assert read_manifest(out)["job"]["codebook"]["digest"] != book.info.digest


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (["--dtype", "int32"], '--dtype was not given and is "int32"'),
        (["--format", "npz"], '--format was "npy" and is "npz"'),
        (["--layout", "channels_last"], '--layout was not given and is "channels_last"'),
        (["--unbatched"], "--unbatched was not given and is given"),
        (["--member", "x"], '--member was not given and is ["x"]'),
    ],
)
def test_other_options_are_refused(vqserve, source, tmp_path, options, difference):
    out = tmp_path / "tokens"
    vqserve("encode", source, "-o", out)
    before = tree(out)
    code, _, said = vqserve("encode", source, "-o", out, *options)
    assert code == 1
    assert difference in said
    assert "--force" in said
    assert tree(out) == before


def test_other_sources_are_refused(vqserve, source, tmp_path):
    out = tmp_path / "tokens"
    vqserve("encode", source, "-o", out)
    np.save(source / "new.npy", np.zeros((1, 4, 2, 2), np.float32))
    (source / "a.npy").unlink()
    np.save(source / "e.npy", np.zeros((1, 4, 2, 3), np.float32))
    code, _, said = vqserve("encode", source, "-o", out)
    assert code == 1
    for name, what in (("a.npy", "is missing"), ("new.npy", "is new"), ("e.npy", "was changed")):
        assert f'source "{source / name}" {what}' in said
    # With --force nothing of the old output is left.
    assert vqserve("encode", source, "-o", out, "--force")[0] == 0
    assert vqserve("encode", source, "-o", tmp_path / "whole")[0] == 0
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.parametrize("change", ["other", "removed"])
def test_a_source_that_changes_meanwhile(client, source, tmp_path, change):
    data = DataSet(client, "encode", [str(source)], tmp_path / "tokens", JobOptions(format="npz"))
    changed = source / "g" / "19.npy"
    if change == "other":
        np.save(changed, np.ones((1, 4, 4, 5), np.float32))
    else:
        changed.unlink()
    with pytest.raises(bulk.FileError, match=r"19\.npy was changed or removed while the job was running"):
        data.run()
    assert not read_manifest(tmp_path / "tokens")["complete"]
    assert not list((tmp_path / "tokens").glob("*.npz"))


@pytest.mark.parametrize("damage", ["missing", "longer", "other"])
def test_an_output_that_was_damaged(vqserve, source, tmp_path, damage):
    out = tmp_path / "tokens"
    vqserve("encode", source, "-o", out)
    path = out / "b" / "c.npy"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content + b"x" if damage == "longer" else content[:-1] + bytes([content[-1] ^ 1]))
    for command in (("encode", source, "-o", out), ("decode", out, "-o", tmp_path / "decoded")):
        code, _, said = vqserve(*command)
        assert code == 1
        assert str(path) in said


def test_a_folder_with_something_else_in_it(vqserve, source, tmp_path):
    out = tmp_path / "tokens"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    for force in ((), ("--force",)):
        code, _, said = vqserve("encode", source, "-o", out, *force)
        assert code == 1
        assert "is not empty" in said
    assert sorted(path.name for path in out.iterdir()) == ["mine.txt"]


def test_two_jobs_in_one_folder(start, vqserve, many, tmp_path):
    out = tmp_path / "tokens"
    process = start("encode", many, "-o", out, *OPTIONS)
    eventually(lambda: _parts(out) >= 1)
    process.send_signal(signal.SIGSTOP)
    try:
        code, _, said = vqserve("encode", many, "-o", out, *OPTIONS)
    finally:
        process.send_signal(signal.SIGCONT)
    assert code == 1
    assert "another job writes to" in said


def test_an_output_that_is_not_complete_is_not_decoded(vqserve, source, tmp_path):
    out = tmp_path / "tokens"
    np.save(source / "h.npy", np.zeros((1, 3, 2, 2), np.float32))
    assert vqserve("encode", source, "-o", out, "--max-errors", 0)[0] == 1
    code, _, said = vqserve("decode", out, "-o", tmp_path / "decoded")
    assert code == 1
    assert "is not complete" in said


def test_an_output_can_be_moved(vqserve, source, tmp_path):
    vqserve("encode", source, "-o", tmp_path / "tokens")
    shutil.move(tmp_path / "tokens", tmp_path / "elsewhere")
    assert vqserve("decode", tmp_path / "elsewhere", "-o", tmp_path / "decoded")[0] == 0
