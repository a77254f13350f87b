"""Outputs that were killed at a bad moment, damaged, or made by a stranger, and sources with hostile names."""

from __future__ import annotations

import json

import numpy as np
import pytest

from support.trees import tree

ARRAY = np.zeros((1, 4, 2, 2), np.float32)


def _save(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, ARRAY)


def _edit(path, change):
    """Change a line of JSON, the first of a record file."""
    first, _, rest = path.read_text().partition("\n")
    fields = json.loads(first)
    change(fields)
    path.write_text(f"{json.dumps(fields)}\n{rest}")


def test_a_job_that_was_killed_while_it_wrote_the_first_manifest(vqserve, source, tmp_path):
    out = tmp_path / "tokens"
    (out / "manifest").mkdir(parents=True)
    (out / ".manifest.json.0123abcd.part").write_text("{")
    (out / "manifest" / ".sources.jsonl.0123abcd.part").write_text("{")
    assert vqserve("encode", source, "-o", out)[0] == 0
    assert vqserve("encode", source, "-o", tmp_path / "whole")[0] == 0
    assert tree(out) == tree(tmp_path / "whole")


def test_a_job_that_is_killed_while_it_removes_an_output(vqserve, source, tmp_path, monkeypatch):
    out = tmp_path / "tokens"
    options = ("--format", "npz", "--shard-items", 3)
    assert vqserve("encode", source, "-o", out, *options)[0] == 0
    assert vqserve("encode", source, "-o", tmp_path / "whole")[0] == 0
    path_type = type(out)
    remove = path_type.unlink
    for moment in (1, 9, 12, 14):
        removed = []

        def unlink(path, missing_ok=False, *, removed=removed, moment=moment):
            if len(removed) == moment:
                raise SystemExit(137)
            removed.append(path)
            remove(path, missing_ok=missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(path_type, "unlink", unlink)
            assert vqserve("encode", source, "-o", out, "--force")[0] == 137
        # What is left is never taken for a whole output.
        assert vqserve("decode", out, "-o", tmp_path / f"decoded-{moment}")[0] == 1
    assert vqserve("encode", source, "-o", out, "--force")[0] == 0
    assert tree(out) == tree(tmp_path / "whole")


def test_force_removes_the_output_and_nothing_else(vqserve, source, tmp_path):
    out = tmp_path / "tokens"
    assert vqserve("encode", source, "-o", out)[0] == 0
    mine = [out / "manifest" / "mine.txt", out / "manifest" / "more" / "mine.txt", out / "mine.txt"]
    mine[1].parent.mkdir()
    (out / "empty").mkdir()
    for path in mine:
        path.write_text("mine")
    assert vqserve("encode", source, "-o", out, "--force", "--format", "npz")[0] == 0
    assert all(path.read_text() == "mine" for path in mine)
    assert (out / "empty").is_dir()
    assert not (out / "b").exists()


@pytest.mark.parametrize("name", ["../victim.npy", "b/../../victim.npy", "{absolute}", "link/victim.npy"])
@pytest.mark.parametrize("command", ["force", "again", "decode"])
def test_records_that_name_files_elsewhere(vqserve, source, tmp_path, name, command):
    victim = tmp_path / "victim.npy"
    np.save(victim, ARRAY)
    out = tmp_path / "tokens"
    assert vqserve("encode", source, "-o", out)[0] == 0
    (out / "link").symlink_to(tmp_path)
    name = name.format(absolute=victim)
    _edit(out / "manifest" / "part-00000.jsonl", lambda part: part["files"][0].update(name=name))
    arguments = {"force": ("encode", source, "-o", out, "--force"), "again": ("encode", source, "-o", out)}
    code, _, said = vqserve(*arguments.get(command, ("decode", out, "-o", tmp_path / "decoded")))
    assert code == 1
    assert "which is not below it" in said
    assert victim.exists()


def test_records_that_are_a_link(vqserve, source, tmp_path):
    out = tmp_path / "tokens"
    assert vqserve("encode", source, "-o", out)[0] == 0
    (out / "manifest").rename(tmp_path / "elsewhere")
    (out / "manifest").symlink_to(tmp_path / "elsewhere")
    before = tree(tmp_path / "elsewhere")
    code, _, said = vqserve("encode", source, "-o", out, "--force")
    assert code == 1
    assert "is a link" in said
    assert tree(tmp_path / "elsewhere") == before


@pytest.mark.parametrize("number", [0, 3, 8])
def test_records_of_a_part_that_are_missing(vqserve, source, tmp_path, number):
    out = tmp_path / "tokens"
    options = ("--format", "npz", "--shard-items", 3)
    assert vqserve("encode", source, "-o", out, *options)[0] == 0
    whole = tree(out)
    (out / "manifest" / f"part-{number:05}.jsonl").unlink()
    code, _, said = vqserve("decode", out, "-o", tmp_path / "decoded")
    assert code == 1
    assert "it is damaged" in said
    assert vqserve("encode", source, "-o", out, *options)[0] == 0
    assert tree(out) == whole


@pytest.mark.parametrize("name", ["manifest.json", "manifest/sources.jsonl", "manifest/part-00000.jsonl"])
@pytest.mark.parametrize("content", ["", "{}\n", "[]\n", "null\n", '{"form":1,"complete":true,"job":{}}\n', "\x00\n"])
def test_records_that_are_damaged(vqserve, source, tmp_path, name, content):
    out = tmp_path / "tokens"
    assert vqserve("encode", source, "-o", out)[0] == 0
    (out / name).write_text(content)
    code, _, said = vqserve("encode", source, "-o", out)
    assert code == 1
    assert str(out) in said
    if name != "manifest/sources.jsonl":
        code, _, said = vqserve("decode", out, "-o", tmp_path / "decoded")
        assert code == 1
        assert str(out) in said


def test_tokens_that_were_made_again_are_decoded_again(vqserve, source, tmp_path):
    out = tmp_path / "tokens"
    assert vqserve("encode", source, "-o", out)[0] == 0
    assert vqserve("decode", out, "-o", tmp_path / "decoded")[0] == 0
    # The last file of the part is another one, of the same size.
    np.save(source / "g" / "19.npy", ARRAY.repeat(2, 2).repeat(2, 3) + 9)
    assert vqserve("encode", source, "-o", out, "--force")[0] == 0
    code, _, said = vqserve("decode", out, "-o", tmp_path / "decoded")
    assert code == 1
    assert "was changed" in said


@pytest.mark.parametrize("folder", ["manifest", "manifest.json", "errors.jsonl"])
def test_folders_of_the_names_of_records(vqserve, tmp_path, folder):
    _save(tmp_path / "latents", "a.npy", f"{folder}/part-00000.npy")
    out = tmp_path / "tokens"
    code, _, said = vqserve("encode", tmp_path / "latents", "-o", out)
    assert code == 1
    assert f"begins with {folder}/" in said
    assert not list(out.rglob("*.npy"))
    assert vqserve("encode", tmp_path / "latents", "-o", tmp_path / "shards", "--format", "npz")[0] == 0
    # Below another folder they are as any other.
    (tmp_path / "above").mkdir()
    (tmp_path / "latents").rename(tmp_path / "above" / "latents")
    assert vqserve("encode", tmp_path / "above", "-o", tmp_path / "below")[0] == 0
    # Nor do tokens become files there.
    code, _, said = vqserve("decode", tmp_path / "shards", "-o", tmp_path / "decoded")
    assert code == 1
    assert f"begins with {folder}/" in said


def test_a_key_whose_file_is_the_folder_of_another(vqserve, tmp_path):
    _save(tmp_path / "latents", "a.npy")
    np.savez(tmp_path / "latents" / "a.npy.npz", x=ARRAY)
    out = tmp_path / "tokens"
    code, _, said = vqserve("encode", tmp_path / "latents", "-o", out)
    assert code == 1
    assert "needs the file a.npy, and other keys have a folder of that name" in said
    assert not (out / "a.npy").exists()
