"""`vqserve encode` and `decode` of a data set: what is written, and that it is what single calls return."""

from __future__ import annotations

import json

import numpy as np
import pytest

from support.trees import tree
from vqserve_client import bulk
from vqserve_client.bulk import ConversionOptions, JobOptions, Limits
from vqserve_client.bulk.records import read_manifest, read_parts

FORMATS = ["npy", "npz", "safetensors", "tar", "parquet", "stream"]


def by_key(folder):
    return {line["key"]: line for _, lines in read_parts(folder) for line in lines}


def test_every_array_has_the_indices_of_a_call_of_its_own(vqserve, client, source, arrays, tmp_path, book):
    code, out, said = vqserve("encode", source, "-o", tmp_path / "tokens")
    assert (code, out) == (0, "")
    assert f"26 items, 553 tokens, codebook small, digest {book.info.digest}" in said
    for key, latents in arrays.items():
        indices = np.load(tmp_path / "tokens" / f"{key}.npy")
        expected = client.encode(latents)
        assert indices.dtype == expected.dtype == np.uint16
        assert (indices == expected).all()
    assert sorted(by_key(tmp_path / "tokens")) == sorted(arrays)


def test_the_manifest_says_what_made_the_tokens(vqserve, source, tmp_path, book):
    vqserve("encode", source, "-o", tmp_path / "tokens", "--layout", "channels_first")
    manifest = read_manifest(tmp_path / "tokens")
    assert manifest["complete"]
    assert (manifest["items"], manifest["bad"], manifest["tokens"], manifest["parts"]) == (26, 0, 553, 1)
    job = manifest["job"]
    assert job["codebook"]["digest"] == book.info.digest
    assert (job["codebook"]["name"], job["codebook"]["vocab_size"]) == ("small", 300)
    assert job["options"]["layout"] == "channels_first"
    assert job["format"]["name"] == "npy"
    assert by_key(tmp_path / "tokens")["b/c"]["shape"] == [2, 4, 4, 6]


@pytest.mark.parametrize("form", FORMATS)
def test_there_and_back(vqserve, client, source, arrays, tmp_path, form):
    options = ("--format", form, "--shard-items", 5)
    assert vqserve("encode", source, "-o", tmp_path / "tokens", *options)[0] == 0
    assert vqserve("decode", tmp_path / "tokens", "-o", tmp_path / "decoded")[0] == 0
    for key, latents in arrays.items():
        decoded = np.load(tmp_path / "decoded" / f"{key}.npy")
        assert (decoded == client.decode(client.encode(latents))).all()


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "stream"])
def test_latents_in_every_format(vqserve, client, source, arrays, tmp_path, form):
    vqserve("encode", source, "-o", tmp_path / "tokens")
    options = ("--dtype", "float16", "--format", form)
    assert vqserve("decode", tmp_path / "tokens", "-o", tmp_path / "decoded", *options)[0] == 0
    # Decoded latents are latents: what is encoded again, from any format, has the indices that it had.
    members = ("--member", "latents.npy") if form == "tar" else ("--column", "latents") if form == "parquet" else ()
    assert vqserve("encode", tmp_path / "decoded", "-o", tmp_path / "again", *members)[0] == 0
    assert len(by_key(tmp_path / "again")) == len(arrays)


def test_tokens_of_two_codebooks_never_meet(vqserve, put, source, tmp_path, serving, monkeypatch):
    vqserve("encode", source, "-o", tmp_path / "tokens")
    other = serving(put(tmp_path / "other" / "small.safetensors", seed=1, num_codes=300))
    monkeypatch.setenv("VQSERVE_TARGET", other.target)
    code, _, said = vqserve("decode", tmp_path / "tokens", "-o", tmp_path / "decoded")
    assert code == 1
    assert "made these tokens" in said
    assert vqserve("decode", tmp_path / "tokens", "-o", tmp_path / "decoded", "--force")[0] == 0


@pytest.mark.parametrize("part", ["b", "*.npy", "a.npy", "shard-00000.npz"])
def test_nor_do_those_in_files_of_an_output(vqserve, put, source, tmp_path, serving, monkeypatch, part):
    tokens = tmp_path / "tokens"
    vqserve("encode", source, "-o", tokens, "--format", "npz" if "shard" in part else "npy")
    other = serving(put(tmp_path / "other" / "small.safetensors", seed=1, num_codes=300))
    decode = ("decode", tokens / part, "-o", tmp_path / "decoded")
    assert vqserve(*decode)[0] == 0
    monkeypatch.setenv("VQSERVE_TARGET", other.target)
    for out in ("others", *(["others.npy"] if part == "a.npy" else [])):
        code, _, said = vqserve("decode", tokens / part, "-o", tmp_path / out)
        assert code == 1
        assert "made these tokens" in said


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_sources_give_the_same_bytes(vqserve, source, tmp_path, form):
    for name in ("one", "two"):
        vqserve("encode", source, "-o", tmp_path / name, "--format", form, "--shard-bytes", "1K")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert len(list(read_parts(tmp_path / "one"))) > 1


def test_large_arrays_go_in_pieces(vqserve, client, tmp_path, monkeypatch):
    monkeypatch.setattr("vqserve_client.conversion.PIECE_BYTES", 1024)
    latents = np.random.default_rng(0).standard_normal((3, 4, 20, 30)).astype(np.float32)
    np.save(tmp_path / "large.npy", latents)
    assert vqserve("encode", tmp_path / "large.npy", "-o", tmp_path / "tokens")[0] == 0
    assert (np.load(tmp_path / "tokens" / "large.npy") == client.encode(latents)).all()


def test_arrays_without_a_batch_axis(vqserve, client, tmp_path):
    generator = np.random.default_rng(0)
    (tmp_path / "latents").mkdir()
    images = {name: generator.standard_normal(shape) for name, shape in (("a", (4, 6, 5)), ("b", (4, 2, 3)))}
    for name, image in images.items():
        np.save(tmp_path / "latents" / f"{name}.npy", image)
    # What has a batch axis is a video to --unbatched; two axes are a sequence.
    np.save(tmp_path / "latents" / "wrong.npy", generator.standard_normal((1, 3, 6, 5)))
    code, _, said = vqserve("encode", tmp_path / "latents", "-o", tmp_path / "tokens", "--unbatched")
    assert code == 3
    assert "without a result: 1 item;" in said
    for name, image in images.items():
        indices = np.load(tmp_path / "tokens" / f"{name}.npy")
        assert indices.shape == image.shape[1:]
        assert (indices == client.encode(image[None])[0]).all()
    vqserve("decode", tmp_path / "tokens", "-o", tmp_path / "decoded")
    assert np.load(tmp_path / "decoded" / "a.npy").shape == (4, 6, 5)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64"])
def test_the_type_of_the_indices(vqserve, source, tmp_path, dtype):
    assert vqserve("encode", source, "-o", tmp_path / "tokens", "--dtype", dtype)[0] == 0
    assert np.load(tmp_path / "tokens" / "a.npy").dtype == dtype


def test_a_type_that_cannot_hold_the_vocabulary(vqserve, source, tmp_path):
    code, _, said = vqserve("encode", source, "-o", tmp_path / "tokens", "--dtype", "uint8")
    assert code == 1
    assert said == (
        "vqserve: error: --dtype uint8 cannot hold the indices of codebook 'small', which are below 300: uint16 is the "
        "smallest that can\n"
    )
    assert not (tmp_path / "tokens").exists()


def test_from_python(client, source, arrays, tmp_path):
    summary = bulk.encode(client, [str(source)], tmp_path / "tokens", JobOptions(format="npz"))
    assert (summary.items, summary.bad, summary.tokens) == (len(arrays), 0, 553)
    options = JobOptions(conversion=ConversionOptions(dtype="float16"), limits=Limits(shard_items=4))
    assert bulk.decode(client, [str(tmp_path / "tokens")], tmp_path / "decoded", options).items == len(arrays)
    assert np.load(tmp_path / "decoded" / "b" / "c.npy").dtype == np.float16
    # One source needs no list, and paths may be strings.
    assert bulk.encode(client, source / "b", str(tmp_path / "b")).items == 2
    assert bulk.encode(client, str(source / "b" / "c.npy"), tmp_path / "c").items == 1


def test_progress_as_json(vqserve, source, tmp_path):
    code, out, said = vqserve("encode", source, "-o", tmp_path / "tokens", "--json")
    assert (code, said) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    assert {line["event"] for line in lines[:-1]} <= {"progress"}
    assert lines[-1]["event"] == "end"
    assert (lines[-1]["items"], lines[-1]["bad"], lines[-1]["tokens"]) == (26, 0, 553)


def test_a_dry_run_writes_nothing(vqserve, source, tmp_path, book):
    (source / "notes.txt").write_text("not read")
    code, out, said = vqserve("encode", source, "-o", tmp_path / "tokens", "--dry-run")
    assert (code, said) == (0, "")
    assert f"digest {book.info.digest}" in out
    assert "26 items (a, b/c, b/d, ...)" in out
    assert "553 tokens, uint16, 1.11 kB" in out
    assert "left out: 1 file of other types" in out
    assert not (tmp_path / "tokens").exists()


def test_a_dry_run_as_json(vqserve, source, tmp_path):
    code, out, said = vqserve("encode", source, "-o", tmp_path / "tokens", "--dry-run", "--json")
    assert (code, said) == (0, "")
    outlook = json.loads(out)
    assert (outlook["event"], outlook["items"], outlook["tokens"], outlook["begun_items"]) == ("outlook", 26, 553, 0)
    assert vqserve("encode", source, "-o", tmp_path / "tokens")[0] == 0
    code, out, _ = vqserve("encode", source, "-o", tmp_path / "tokens", "--dry-run")
    assert "done before: 26 items" in out
    code, _, said = vqserve("encode", source, "-o", tmp_path / "tokens", "--dry-run", "--dtype", "int64")
    assert code == 1
    assert '--dtype was not given and is "int64"' in said


def test_options_for_data_sets_are_not_ignored(vqserve, source, tmp_path):
    code, _, said = vqserve("encode", source / "a.npy", "-o", tmp_path / "a.npy", "--format", "tar")
    assert code == 1
    assert "--format is for data sets" in said
    code, _, said = vqserve("encode", source / "a.npy", source / "e.npy", "-o", tmp_path / "a.npy")
    assert code == 1
    assert "one file, and there are 2 sources" in said
    code, _, said = vqserve("encode", source, "-o", tmp_path / "a.npy")
    assert code == 1
    assert f"is one file, and {source} is a folder" in said
    code, _, said = vqserve("encode", source, "-o", tmp_path / "tokens.npz")
    assert code == 1
    assert "is the name of a file, and what is written is a folder" in said


def test_two_items_with_one_key(vqserve, source, tmp_path):
    (source / "f").mkdir()
    np.save(source / "f" / "x.npy", np.zeros((1, 4, 2, 2), np.float32))
    code, _, said = vqserve("encode", source, "-o", tmp_path / "tokens")
    assert code == 1
    assert "two items have the key 'f/x'" in said
    assert not (tmp_path / "tokens" / "a.npy").exists()


def test_what_is_written_is_apart_from_what_is_read(vqserve, source):
    for out in (source, source / "tokens"):
        code, _, said = vqserve("encode", source, "-o", out)
        assert code == 1
        assert f"is in {source}, which is read" in said
    code, _, said = vqserve("encode", source / "b" / "*.npy", "-o", source)
    assert code == 1
    assert f"{source / 'b'} is read, and in {source}, which is written" in said
    assert not (source / "manifest.json").exists()
