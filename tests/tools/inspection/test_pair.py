"""`vqserved inspect A B`: two codebooks side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from vqserve_server.codebooks import save_codebook
from vqserve_server.quantizers import (
    CosineQuantizer,
    FiniteScalarQuantizer,
    Quantizer,
    ResidualQuantizer,
    VectorQuantizer,
)
from vqserve_tools import cli


def vq(change: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows, codes: int = 12) -> VectorQuantizer:
    quantizer = VectorQuantizer(codes, 3)
    rows = change(torch.randn(codes, 3, generator=torch.Generator().manual_seed(0)))
    quantizer.embedding.weight.data = rows
    return quantizer


def square(*, transposed: bool) -> VectorQuantizer:
    quantizer = VectorQuantizer(5, 5)
    rows = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    quantizer.embedding.weight.data = rows.T.contiguous() if transposed else rows
    return quantizer


def columns() -> VectorQuantizer:
    quantizer = VectorQuantizer(3, 12)
    quantizer.embedding.weight.data = vq().embedding.weight.data.T.contiguous()
    return quantizer


def cosine() -> CosineQuantizer:
    quantizer = CosineQuantizer(12, 3)
    quantizer.embedding.weight.data = vq().embedding.weight.data
    return quantizer


def rvq(order: list[int]) -> ResidualQuantizer:
    quantizer = ResidualQuantizer(len(order), 12, 3)
    generator = torch.Generator().manual_seed(0)
    stages = [torch.randn(12, 3, generator=generator) for _ in range(4)]
    for book, place in zip(quantizer.codebooks(), order, strict=True):
        book.embedding.weight.data = stages[place]
    return quantizer


PAIRS: dict[str, tuple[Quantizer, Quantizer, str]] = {
    "equal": (vq(), vq(), "the same codebook: equal tokens and latents"),
    "metric": (vq(), cosine(), "the same codes, used in another way: kind vq and kind cosine"),
    "order of codes": (vq(), vq(lambda rows: rows.flip(0)), "the same codes in another order"),
    "square": (square(transposed=False), square(transposed=True), "the codes of one are the columns of the other"),
    "columns": (vq(), columns(), "the codes of one are the columns of the other"),
    "order of stages": (rvq([0, 1, 2]), rvq([2, 0, 1]), "the same stages in another order: 2, 3, 1"),
    "fewer stages": (rvq([0, 1, 2, 3]), rvq([0, 1]), "the same first 2 stages, of 4 and of 2"),
    "rounded": (vq(), vq(lambda rows: rows.bfloat16().float()), "nearly the same codes"),
    "other codes": (vq(), vq(lambda rows: rows + 1), "different codes"),
    "other sizes": (vq(), vq(codes=20), "different codebooks: 12 x 3 and 20 x 3"),
    "levels": (FiniteScalarQuantizer([5, 5]), FiniteScalarQuantizer([5, 3]), "levels [5, 5] and [5, 3]"),
}


def run(capsys, *arguments):
    status = cli.main(["inspect", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def pair(tmp_path: Path):
    def save(a: Quantizer, b: Quantizer) -> tuple[Path, Path]:
        paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
        for quantizer, path in zip((a, b), paths, strict=True):
            save_codebook(quantizer, path)
        return paths

    return save


@pytest.mark.parametrize("name", PAIRS)
def test_verdict(pair, capsys, name):
    a, b, expected = PAIRS[name]
    status, text, err = run(capsys, *pair(a, b))
    assert (status, err) == (0, "")
    verdict = text[text.index("\nverdict") :]
    assert expected in " ".join(verdict.split())


def test_which_fits_better(pair, tmp_path, capsys):
    rows = vq().embedding.weight.data.numpy()
    np.save(tmp_path / "z.npy", np.repeat(rows, 10, axis=0) + np.float32(0.01))
    files = pair(vq(lambda rows: rows + 1), vq())
    report = json.loads(run(capsys, *files, "--latents", tmp_path / "z.npy", "--json")[1])
    assert report["format"] == 1
    assert [one["num_codes"] for one in report["reports"]] == [12, 12]
    assert "b fits better: SNR" in report["verdict"]
    assert "% of 120 tokens are equal" in report["verdict"]


@pytest.mark.parametrize("columns", [80, 120])
def test_text(pair, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = run(capsys, *pair(rvq([0, 1, 2, 3]), rvq([3, 2, 1, 0])))[1]
    lines = text.splitlines()
    assert lines[0].split() == ["a", "b"]
    assert max(map(len, lines)) <= columns
    assert lines[1].split() == ["kind", "rvq", "rvq"]


def test_files_of_one_name_are_told_apart(tmp_path, capsys):
    for folder in ("old", "new"):
        (tmp_path / folder).mkdir()
        save_codebook(vq(), tmp_path / folder / "book.safetensors")
    text = run(capsys, tmp_path / "old/book.safetensors", tmp_path / "new/book.safetensors")[1]
    assert "the same codebook" in text


def test_one_picture_on_common_axes(pair, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    np.save(tmp_path / "z.npy", np.zeros((10, 3), np.float32))
    files = pair(rvq([0, 1, 2]), vq())
    arguments = ("--latents", tmp_path / "z.npy", "--plot", tmp_path / "p.png")
    assert run(capsys, *files, *arguments)[0] == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_says_which_codebook_is_where_and_what_has_no_figures(pair, tmp_path, capsys, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure", reason="the extra plot is not installed")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    files = pair(vq(), FiniteScalarQuantizer([5, 5]))
    assert run(capsys, *files, "--plot", tmp_path / "p.png")[0] == 0
    headings = drawn[0].get_suptitle().splitlines()
    assert [heading.partition(":")[0] for heading in headings] == ["left, a", "right, b"]
    texts = [[text.get_text() for text in axes.texts] for axes in drawn[0].axes]
    assert texts == [[], ["none for this kind"]] * 2


def test_stages_fill_the_axis_unless_one_is_collapsed(pair, tmp_path, capsys, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure", reason="the extra plot is not installed")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    files = pair(rvq([0, 1, 2]), rvq([2, 1, 0]))
    assert run(capsys, *files, "--plot", tmp_path / "p.png")[0] == 0
    assert all(axes.yaxis.get_transform().linthresh > 0.001 for axes in drawn[0].axes)


def test_latents_that_fit_one_codebook_only(pair, tmp_path, capsys):
    np.save(tmp_path / "z.npy", np.zeros((10, 3), np.float32))
    status, _, err = run(capsys, *pair(vq(), columns()), "--latents", tmp_path / "z.npy")
    assert status == 1
    assert err.endswith("have 3 channels in layout channels_last, the codebook takes 12 (codebook 'b')\n")


def test_three_files_are_too_many(pair, capsys):
    a, b = pair(vq(), vq())
    status, _, err = run(capsys, a, b, a)
    assert status == 1
    assert "3 files are given: name one to describe it, or two to compare them" in err
