"""Items without a result: recorded with a reason, left out, and no reason for the others to stop."""

from __future__ import annotations

import json

import numpy as np
import pytest


@pytest.fixture
def faulty(source):
    """The data set, with one file of every fault."""
    latents = np.zeros((1, 4, 2, 3), np.float32)
    latents[0, 1, 1, 2] = np.nan
    np.save(source / "nan.npy", latents)
    np.save(source / "channels.npy", np.zeros((1, 5, 2, 2), np.float32))
    np.save(source / "integers.npy", np.zeros((1, 4, 2, 2), np.int64))
    np.save(source / "objects.npy", np.array([{}], object), allow_pickle=True)
    (source / "corrupt.npy").write_bytes((source / "a.npy").read_bytes()[:-7])
    (source / "empty.npy").write_bytes(b"")
    (source / "text.npz").write_text("no archive")
    return source


def errors(folder):
    return {line["key"]: line["reason"] for line in map(json.loads, (folder / "errors.jsonl").read_text().splitlines())}


def test_all_others_are_there(vqserve, faulty, arrays, tmp_path):
    code, _, said = vqserve("encode", faulty, "-o", tmp_path / "tokens")
    assert code == 3
    assert "26 items" in said
    assert f"without a result: 7 items; {tmp_path / 'tokens' / 'errors.jsonl'} says why. The first:" in said
    assert f"channels in {faulty / 'channels.npy'}: latents of shape (1, 5, 2, 2) have 5 channels" in said
    reasons = errors(tmp_path / "tokens")
    assert sorted(reasons) == ["channels", "corrupt", "empty", "integers", "nan", "objects", "text"]
    assert reasons["nan"] == "latents[0, 1, 1, 2] is nan"
    assert all((tmp_path / "tokens" / f"{key}.npy").exists() for key in arrays)


def test_a_position_is_one_in_the_whole_array(vqserve, tmp_path, monkeypatch):
    monkeypatch.setattr("vqserve_client.conversion.PIECE_BYTES", 1024)
    latents = np.zeros((3, 4, 20, 30), np.float32)
    latents[2, 3, 11, 17] = np.inf
    np.save(tmp_path / "large.npy", latents)
    assert vqserve("encode", tmp_path / "large.npy", "-o", tmp_path / "tokens")[0] == 3
    assert errors(tmp_path / "tokens") == {"large": "latents[2, 3, 11, 17] is inf"}
    assert not list((tmp_path / "tokens").rglob("*.npy"))


def test_too_many(vqserve, faulty, tmp_path):
    code, _, said = vqserve("encode", faulty, "-o", tmp_path / "tokens", "--max-errors", 2)
    assert code == 1
    assert "3 items have no result, and --max-errors is 2" in said
    assert len(errors(tmp_path / "tokens")) == 3
    # A higher limit goes on.
    assert vqserve("encode", faulty, "-o", tmp_path / "tokens", "--max-errors", 7)[0] == 3
    assert len(errors(tmp_path / "tokens")) == 7


def test_a_job_without_a_result_is_not_in_the_way_of_the_next(vqserve, tmp_path):
    (tmp_path / "latents").mkdir()
    np.save(tmp_path / "latents" / "a.npy", np.zeros((4, 8, 8), np.float32))
    code, _, said = vqserve("encode", tmp_path / "latents", "-o", tmp_path / "tokens")
    assert code == 3
    assert "is the batch axis missing? pass --unbatched" in said
    assert vqserve("encode", tmp_path / "latents", "-o", tmp_path / "tokens", "--unbatched")[0] == 0
    assert not (tmp_path / "tokens" / "errors.jsonl").exists()
    assert vqserve("encode", tmp_path / "latents", "-o", tmp_path / "tokens")[0] == 1


def test_a_reason_names_the_shape_of_the_array(vqserve, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 5), np.float32))
    assert vqserve("encode", tmp_path / "a.npy", "-o", tmp_path / "tokens", "--unbatched")[0] == 3
    assert errors(tmp_path / "tokens")["a"] == (
        "latents of shape (4, 5) have 5 channels in layout channels_last, the codebook takes 4: should it be "
        "--layout channels_first?"
    )


def test_none_of_them_can_be_read(vqserve, tmp_path):
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "a.npy").write_bytes(b"")
    assert vqserve("encode", tmp_path / "latents", "-o", tmp_path / "tokens")[0] == 3
    assert vqserve("decode", tmp_path / "tokens", "-o", tmp_path / "decoded")[0] == 0


def test_without_any_there_is_no_list(vqserve, source, tmp_path):
    assert vqserve("encode", source, "-o", tmp_path / "tokens")[0] == 0
    assert not (tmp_path / "tokens" / "errors.jsonl").exists()
