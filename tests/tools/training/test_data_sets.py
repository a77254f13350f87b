"""`vqserved train` on data sets, as a user calls it."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vqserve_server.codebooks import load_codebook
from vqserve_tools.cli import main

ITEMS = 120


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of items of several shapes, 4 channels."""
    folder, rng = tmp_path / "latents", np.random.default_rng(0)
    (folder / "more").mkdir(parents=True)
    for number in range(ITEMS - 20):
        height, width = rng.integers(2, 5, 2)
        item = rng.normal(size=(1, 4, height, width)).astype(np.float32)
        np.save(folder / ("more" if number % 2 else "") / f"{number:03}.npy", item)
    np.savez(folder / "z.npz", **{f"m{number}": rng.normal(size=(1, 4, 3, 3)) for number in range(20)})
    return folder


def train(*arguments: object, out: Path) -> int:
    options = ["--num-codes=16", "--steps=20", "--batch-size=100", "--device=cpu"]
    return main(["train", *map(str, arguments), "-o", str(out), *options])


def test_a_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "book.safetensors"
    assert train(folder, out=out) == 0
    output = capsys.readouterr()
    codebook = load_codebook(out)
    story = codebook.provenance
    latents, held_out = story["latents"], story["held_out"]
    rows = latents["rows"]
    assert latents | {"bytes": 0, "digest": ""} == {
        "sources": ["latents"],
        "files": 101,
        "bytes": 0,
        "digest": "",
        "items": ITEMS,
        "bad_items": 0,
        "rows": rows,
        "sampled_rows": rows,
        "dtypes": ["float32", "float64"],
        "layouts": ["channels_first"],
    }
    assert latents["bytes"] == sum(file.stat().st_size for file in folder.rglob("*.np?"))
    assert len(latents["digest"]) == 64
    assert (held_out["share"], held_out["unit"], held_out["units"], held_out["of"]) == (0.05, "items", 6, ITEMS)
    assert str(tmp_path) not in str(story)
    assert codebook.statistics is not None
    assert codebook.statistics.rows == rows - held_out["rows"]
    quality, new = story["quality"], held_out["quality"]
    error, new_error = quality["mean_squared_error"], new["mean_squared_error"]
    assert output.out.splitlines() == [
        "trained ema, 16 codes of 4: 20 steps of 100 rows, 0 codes reseeded",
        f"read {ITEMS} items of 101 files, all {rows} rows",
        f"trained on {rows - held_out['rows']} rows, held out {held_out['rows']}, 6 of {ITEMS} items",
        f"mean squared error {error:.6g}, held out {new_error:.6g} ({new_error / error - 1:+.1%})",
        f"perplexity {quality['perplexity']:.1f}, held out {new['perplexity']:.1f}",
        f"used codes {quality['used_codes']} of 16, held out {new['used_codes']}",
        f"wrote {out}, digest {codebook.digest}",
    ]
    lines = output.err.splitlines()
    shape = np.load(folder / "000.npy").shape
    assert f"latents such as 000 {shape} read channels first: 4 channels" in lines


def test_a_batch_axis_that_may_be_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, width in enumerate((6, 6, 6, 5)):
        image = np.random.default_rng(number).normal(size=(4, 100, width)).astype(np.float32)
        np.save(tmp_path / f"{number}.npy", image)
    assert train(tmp_path, out=tmp_path / "book.safetensors") == 0
    said = capsys.readouterr().err
    assert (
        "latents such as 0 (4, 100, 6) read channels last: 6 channels; if they are (C, h, w), pass --unbatched" in said
    )
    assert "5 channels in layout channels_last, and others have 6: are they (C, h, w)? pass --unbatched" in said


def test_the_same_sources_and_seed_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    def content(name: str, *more: object) -> bytes:
        out = tmp_path / f"{name}.safetensors"
        assert train(folder, "--quiet", "--sample-rows=500", *more, out=out) == 0
        return out.read_bytes()

    assert content("one") == content("two")
    assert content("one", "--force") != content("other", "--seed=1")
    assert content("plot", "--plot", tmp_path / "plot.png") == content("one", "--force")


def test_all_rows_of_a_data_set_train_as_those_of_one_file(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(600, 4)).astype(np.float32)
    np.save(tmp_path / "all.npy", rows)
    np.savez(tmp_path / "parts.npz", **{f"m{number}": part for number, part in enumerate(np.split(rows, 6))})
    digests = []
    for source in ("all.npy", "parts.npz"):
        out = tmp_path / f"{source}.safetensors"
        assert train(tmp_path / source, "--quiet", "--held-out=0", out=out) == 0
        digests.append(load_codebook(out).digest)
        assert "held_out" not in load_codebook(out).provenance
    assert digests[0] == digests[1]


def test_rows_of_one_file_are_sampled_and_held_out_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "z.npy", np.random.default_rng(0).normal(size=(600, 4)).astype(np.float32))
    out = tmp_path / "book.safetensors"
    assert train(tmp_path / "z.npy", "--held-out=0.1", out=out) == 0
    assert "\ntrained on 540 rows, held out 60\n" in capsys.readouterr().out
    assert load_codebook(out).provenance["latents"]["file"] == "z.npy"
    assert train(tmp_path / "z.npy", "--sample-rows=200", "--force", out=out) == 0
    output = capsys.readouterr().out
    assert "\nread 1 item of 1 file, a sample of 200 of 600 rows\n" in output
    assert "\ntrained on 190 rows, held out 10\n" in output


def test_all_formats_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    h5py, zarr, pa = (pytest.importorskip(name) for name in ("h5py", "zarr", "pyarrow"))
    import pyarrow.parquet as pq  # noqa: PLC0415

    folder = tmp_path / "latents"
    folder.mkdir()
    rng = np.random.default_rng(0)

    def picture(*shape: int) -> np.ndarray:
        return rng.normal(size=(4, *(shape or (3, 5)))).astype(np.float32)

    np.save(folder / "a.npy", picture())
    np.savez_compressed(folder / "b.npz", x=picture(), y=picture(2, 2))
    save_file({"z": torch.from_numpy(picture()).bfloat16()}, folder / "c.safetensors")
    torch.save({"z": torch.from_numpy(picture())}, folder / "d.pt")
    with tarfile.open(folder / "e.tar", "w") as tar:
        content = io.BytesIO()
        np.save(content, picture())
        for name, data in (("s0.npy", content.getvalue()), ("s0.txt", b"a cat")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    pictures = np.stack([picture() for _ in range(3)])
    pq.write_table(pa.table({"latents": pictures.tolist(), "text": ["x"] * 3}), folder / "f.parquet")
    with h5py.File(folder / "g.h5", "w") as file:
        file["group/z"] = picture().astype(np.float16)
    zarr.create_group(folder / "h.zarr").create_array("z", data=picture())

    out = tmp_path / "book.safetensors"
    assert train(folder, "--unbatched", "--layout=channels_first", "--held-out=0", out=out) == 0
    assert f"\nread 11 items of 8 files, all {10 * 15 + 4} rows\n" in capsys.readouterr().out
    latents = load_codebook(out).provenance["latents"]
    assert latents["dtypes"] == ["float16", "float32", "float64"]
    assert latents["unbatched"] is True


def test_items_that_cannot_be_used_are_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(folder / "000.npy", np.full((1, 4, 2, 2), np.nan, np.float32))
    (folder / "notes.txt").write_text("mine")
    out = tmp_path / "book.safetensors"
    assert train(folder, "--quiet", out=out) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"vqserved: files of types that are not read, left out: 1, such as {folder / 'notes.txt'}",
        f"vqserved: items that cannot be used, left out: 1 of {ITEMS}",
        f"  {folder / '000.npy'}, item 000: latents[0, 0, 0, 0] is nan",
    ]
    assert load_codebook(out).provenance["latents"]["bad_items"] == 1
    assert train(folder, "--quiet", "--force", "--max-errors=0", out=out) == 1
    assert capsys.readouterr().err == (
        f"vqserved: error: 1 item cannot be used, and --max-errors is 0. The last: {folder / '000.npy'}, item 000: "
        "latents[0, 0, 0, 0] is nan\n"
    )


def test_a_plot_shows_the_training(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "book.safetensors", tmp_path / "curve.png"
    assert train(folder, "--quiet", "--plot", plot, out=out) == 0
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert train(folder, "--quiet", "--plot", plot, out=tmp_path / "other.safetensors") == 1
    assert f"{plot} is there already: pass --force to replace it" in capsys.readouterr().err
    assert not (tmp_path / "other.safetensors").exists()


def test_without_matplotlib_it_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert train(folder, "--plot", tmp_path / "p.png", out=tmp_path / "book.safetensors") == 1
    assert "p.png cannot be drawn without matplotlib: pip install 'vqserve[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--held-out=1"], "--held-out must be at least 0 and less than 1, not 1.0"),
        (["--held-out=0.00001"], "rows is 0"),
        (["--sample-rows=0"], "--sample-rows must be at least 1, not 0"),
        (["--sample-rows=10"], "are too few for 16 codes"),
        (["--member=none"], "z.npz: no member matches none"),
    ],
)
def test_options_that_do_not_fit_are_one_line(
    folder: Path, tmp_path: Path, more: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(folder, "--quiet", *more, out=tmp_path / "book.safetensors") == 1
    output = capsys.readouterr().err
    assert text in output
    assert output.count("\n") == 1
    assert not (tmp_path / "book.safetensors").exists()


def test_a_codebook_is_not_written_over_a_source(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "book.safetensors"
    out.write_bytes(b"mine")
    assert train(folder, "--force", out=out) == 1
    assert f"{out} is what is read" in capsys.readouterr().err
    # A codebook of an earlier training is none.
    out.unlink()
    for _ in range(2):
        assert train(folder, "--quiet", "--force", out=out) == 0
        assert load_codebook(out).provenance["latents"]["files"] == 101
    assert train(tmp_path / "none", out=tmp_path / "book.safetensors") == 1
    assert f"{tmp_path / 'none'}: there is no such file" in capsys.readouterr().err
