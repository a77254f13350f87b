"""`vqserved inspect --latents` with data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vqserve_server.codebooks import load_codebook, save_codebook
from vqserve_server.quantizers import VectorQuantizerWithInputProjection
from vqserve_tools import cli


@pytest.fixture
def book(make_quantizer, tmp_path) -> Path:
    path = tmp_path / "c.safetensors"
    save_codebook(make_quantizer("vq"), path)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a folder with the rows of z.npy beside it, in 10 items of which one cannot be used."""
    rows = np.random.default_rng(1).standard_normal((500, 3)).astype(np.float32)
    np.save(tmp_path / "z.npy", rows)
    folder = tmp_path / "latents"
    folder.mkdir()
    for number, part in enumerate(np.split(rows, [20, 60, 61, 200, 300, 400, 450, 480])):
        np.save(folder / f"{number}.npy", part)
    np.save(folder / "bad.npy", np.zeros((2, 4), np.float32))
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main(["inspect", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def fit_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    status, out, err = run(capsys, *arguments, "--json")
    assert status == 0, err
    return json.loads(out)["fit"]


def test_all_rows_give_the_figures_of_one_array(book, folder, tmp_path, capsys):
    whole, parts = (fit_of(capsys, book, "--latents", path) for path in (tmp_path / "z.npy", folder))
    assert parts.pop("latents") == {
        "shape": None,
        "dtype": "float32",
        "layout": "channels_last",
        "tokens": 500,
        "data_set": {"files": 10, "items": 9, "bad_items": 1, "tokens": 500, "is_sampled": False},
    }
    del whole["latents"]
    error, expected = parts.pop("error"), whole.pop("error")
    assert parts == whole
    assert error["mean_squared"] == pytest.approx(expected["mean_squared"], rel=1e-12)
    assert error["distance"] == pytest.approx(expected["distance"])


def test_the_report_says_what_was_read(book, folder, capsys):
    status, text, err = run(capsys, book, "--latents", folder)
    assert status == 0
    # A line is as long as the terminal is wide.
    text = " ".join(text.split())
    assert "all 500 tokens: 9 items (1 left out) of 10 files, float32, channels_last, encoded on" in text
    assert err.splitlines() == [
        "vqserved: items that cannot be used, left out: 1 of 10",
        f"  {folder / 'bad.npy'}, item bad: latents of shape (2, 4) have 4 channels in layout channels_last, "
        "the codebook takes 3",
    ]
    several = [folder / "0.npy", folder / "1.npy"]
    assert "all 60 tokens: 2 items of 2 files" in run(capsys, book, "--latents", *several)[1]


def test_a_sample(book, folder, capsys):
    asked = (book, "--latents", folder, "--sample-rows", 100)
    status, text, _ = run(capsys, *asked)
    assert status == 0
    text = " ".join(text.split())
    assert "a sample of 100 of 500 tokens: 9 items (1 left out) of 10 files" in text
    assert fit_of(capsys, *asked) == fit_of(capsys, *asked)
    # One file is sampled, too.
    text = run(capsys, book, "--latents", folder / "7.npy", "--sample-rows", 10)[1]
    assert "a sample of 10 of 30 tokens: 1 item of 1 file" in text


def test_statistics_of_a_data_set(book, folder, capsys):
    digest = load_codebook(book).digest
    assert run(capsys, book, "--latents", folder, "--save-stats")[0] == 0
    codebook = load_codebook(book)
    assert codebook.digest == digest
    assert codebook.statistics is not None
    assert (codebook.statistics.rows, codebook.statistics.source) == (500, "latents (10 files)")
    assert run(capsys, book, "--latents", folder, "--save-stats", "--sample-rows", 50)[0] == 0
    codebook = load_codebook(book)
    assert (codebook.statistics.rows, codebook.statistics.source) == (50, "a sample of latents (10 files)")


def test_two_codebooks(book, folder, tmp_path, make_quantizer, capsys):
    other = tmp_path / "other.safetensors"
    save_codebook(make_quantizer("vq", seed=1), other)
    status, text, err = run(capsys, book, other, "--latents", folder)
    assert status == 0
    assert "of 500 tokens are equal" in " ".join(text.split())
    assert err.count("left out") == 1


@pytest.mark.parametrize("more", [[], ["--sample-rows=30"]])
def test_a_token_beyond_float32_is_named_with_its_item(tmp_path, capsys, more):
    path = tmp_path / "c.safetensors"
    quantizer = VectorQuantizerWithInputProjection(6, 40, 2).requires_grad_(False)
    quantizer.proj_in.weight.fill_(1)
    save_codebook(quantizer, path)
    array = np.zeros((5, 6, 2, 2), np.float32)
    np.save(tmp_path / "a.npy", array)
    array[3, :, 1, 0] = 3.4e38
    np.savez(tmp_path / "b.npz", z=array)
    status, _, err = run(capsys, path, "--latents", tmp_path / "a.npy", tmp_path / "b.npz", *more)
    assert status == 1
    found = f"{tmp_path / 'b.npz'}, item b/z: the projection of token [3, 1, 0] leaves the range of float32"
    if not more:
        assert err == f"vqserved: error: {found}: scale the latents down\n"
    assert err.count("\n") == 1


def test_codebooks_among_the_latents_are_left_out(book, folder, capsys):
    book.rename(folder / "c.safetensors")
    status, text, err = run(capsys, folder / "c.safetensors", "--latents", folder)
    assert status == 0
    assert "all 500 tokens" in text
    assert f"vqserved: codebook files, left out: 1, such as {folder / 'c.safetensors'}\n" in err
    status, _, err = run(capsys, folder / "c.safetensors", "--latents", folder / "c.safetensors")
    assert status == 1
    assert err == f"vqserved: error: {folder / 'c.safetensors'} is a codebook: name files of latents\n"


@pytest.mark.parametrize("more", [["--unbatched"], ["--sample-rows=3"], ["--member=z"], ["--max-errors=3"]])
def test_options_about_latents_need_latents(book, capsys, more):
    status, _, err = run(capsys, book, *more)
    option = more[0].partition("=")[0]
    assert (status, err) == (1, f"vqserved: error: {option} says how latents are read: give --latents too\n")


def test_without_a_batch_axis(book, tmp_path, capsys):
    np.save(tmp_path / "z.npy", np.zeros((3, 4, 5), np.float32))
    latents = fit_of(capsys, book, "--latents", tmp_path / "z.npy", "--unbatched")["latents"]
    assert (latents["tokens"], latents["layout"]) == (20, "channels_first")
    status, _, err = run(capsys, book, "--latents", tmp_path / "z.npy")
    assert status == 1
    assert "is the batch axis missing" in err
