"""One file of tokens knows the codebook that made it."""

from __future__ import annotations

import json

import numpy as np
import pytest


@pytest.fixture
def tokens(vqserve, source, tmp_path):
    path = tmp_path / "tokens.npy"
    assert vqserve("encode", source / "b" / "c.npy", "-o", path)[0] == 0
    return path


@pytest.fixture
def other(tokens, serving, put, monkeypatch, tmp_path):
    """Another server with another codebook of the same name."""
    server = serving(put(tmp_path / "other" / "small.safetensors", seed=1, num_codes=300))
    monkeypatch.setenv("VQSERVE_TARGET", server.target)


def test_it_says_what_made_the_tokens(tokens, book):
    made = json.loads((tokens.parent / "tokens.npy.json").read_text())
    assert made["codebook"]["digest"] == book.info.digest
    assert made["codebook"]["vocab_size"] == 300
    assert made["operation"] == "encode"


def test_there_and_back(vqserve, tokens, client, arrays, tmp_path):
    assert vqserve("decode", tokens, "-o", tmp_path / "out.npy")[0] == 0
    assert (np.load(tmp_path / "out.npy") == client.decode(client.encode(arrays["b/c"]))).all()
    assert not (tmp_path / "out.npy.json").exists()


@pytest.mark.usefixtures("other")
def test_another_codebook_is_refused(vqserve, tokens, tmp_path, book):
    code, _, said = vqserve("decode", tokens, "-o", tmp_path / "out.npy")
    assert code == 1
    assert f"codebook 'small' with digest {book.info.digest} made these tokens" in said
    assert "--force" in said
    assert vqserve("decode", tokens, "-o", tmp_path / "out.npy", "--force")[0] == 0


@pytest.mark.usefixtures("other")
def test_files_of_a_folder_know_it_too(vqserve, tokens, tmp_path):
    code, _, said = vqserve("decode", tokens.parent / "tokens.npy", "-o", tmp_path / "decoded")
    assert code == 1
    assert "made these tokens" in said


def test_a_part_of_an_output_is_decoded_as_the_whole_is(vqserve, tmp_path):
    (tmp_path / "latents").mkdir()
    for number in range(4):
        np.save(tmp_path / "latents" / f"{number}.npy", np.full((4, 8, 8), number, np.float32))
    for form, part in (("npy", "[01].npy"), ("npz", "shard-00000.npz")):
        out, decoded = tmp_path / form, tmp_path / f"decoded-{form}"
        options = ("--format", form, "--shard-items", 2, "--unbatched")
        assert vqserve("encode", tmp_path / "latents", "-o", out, *options)[0] == 0
        code, _, said = vqserve("decode", out, "-o", decoded, "--member", "0")
        assert code == 1
        assert "is decoded as a whole" in said
        assert vqserve("decode", out / part, "-o", decoded)[0] == 0
        if form == "npy":
            assert vqserve("decode", out / "0.npy", "-o", tmp_path / "one.npy")[0] == 0
            assert np.load(tmp_path / "one.npy").shape == (4, 8, 8)
        assert sorted(np.load(path).shape for path in decoded.rglob("*.npy")) == [(4, 8, 8), (4, 8, 8)]


def test_a_part_of_a_stream_is_not_decoded(vqserve, source, tmp_path):
    out = tmp_path / "stream"
    assert vqserve("encode", source, "-o", out, "--format", "stream")[0] == 0
    code, _, said = vqserve("decode", out / "shard-00000.index.npz", "-o", tmp_path / "decoded")
    assert code == 1
    assert "is of a stream of tokens, which is decoded as a whole" in said


@pytest.mark.parametrize(
    "content",
    [
        '{"codebook": 1}',
        f'{{"codebook": {{"digest": "{"0" * 64}"}}, "options": {{}}}}',
        f'{{"codebook": {{"digest": "{"0" * 64}", "name": "a"}}, "options": {{}}}}',
        "[" * 100_000,
    ],
)
def test_a_damaged_one_is_an_error(vqserve, tokens, tmp_path, content):
    (tokens.parent / "tokens.npy.json").write_text(content)
    code, _, said = vqserve("decode", tokens, "-o", tmp_path / "out.npy")
    assert code == 1
    assert "tokens.npy.json, which says what made tokens.npy, cannot be read" in said


def test_a_run_that_fails_leaves_both(vqserve, tokens, source, tmp_path):
    (source / "a.npy").write_bytes(b"")
    assert vqserve("encode", source / "a.npy", "-o", tokens, "--force")[0] == 1
    assert (np.load(tokens).shape, (tokens.parent / "tokens.npy.json").exists()) == ((2, 4, 6), True)


def test_a_file_of_its_name_is_not_replaced(vqserve, source, tmp_path):
    (tmp_path / "new.npy.json").write_text("mine")
    encode = ("encode", source / "a.npy", "-o", tmp_path / "new.npy")
    code, _, said = vqserve(*encode)
    assert code == 1
    assert "new.npy.json exists: --force replaces it" in said
    assert (tmp_path / "new.npy.json").read_text() == "mine"
    assert not (tmp_path / "new.npy").exists()
    assert vqserve(*encode, "--force")[0] == 0
