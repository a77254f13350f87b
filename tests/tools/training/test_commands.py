"""`vqserved train`, as a user calls it."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest

from vqserve_server import Tokenizer
from vqserve_server.codebooks import load_codebook
from vqserve_tools.cli import main
from vqserve_tools.training import job


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    path = tmp_path / "latents.npy"
    np.save(path, np.random.default_rng(0).normal(size=(2, 3, 20, 25)).astype(np.float16))
    return path


def train(latents: Path, out: Path, *more: str) -> int:
    usual = ["--num-codes=16", "--steps=30"]
    chosen = [option for option in usual if not any(one.startswith(option.partition("=")[0]) for one in more)]
    return main(["train", str(latents), "-o", str(out), "--device=cpu", *chosen, *more])


@pytest.mark.parametrize("kind", ["ema", "vq"])
def test_makes_a_codebook_that_serves(
    latents: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "book.safetensors"
    assert train(latents, out, f"--kind={kind}", "--beta=0.5", "--batch-size=100") == 0
    output = capsys.readouterr()
    tokenizer = Tokenizer.load(out, device="cpu")
    assert (tokenizer.info.kind, tokenizer.info.num_codes, tokenizer.info.code_dim) == (kind, 16, 3)
    assert output.out.splitlines()[0] == f"trained {kind}, 16 codes of 3: 30 steps of 100 rows, 0 codes reseeded"
    assert output.out.splitlines()[-1] == f"wrote {out}, digest {tokenizer.digest}"

    z = np.load(latents)
    error = np.mean((tokenizer.decode(tokenizer.encode(z)) - z) ** 2)
    figures = dict(line.rsplit(" ", 1) for line in output.out.splitlines()[1:3])
    assert float(figures["mean squared error"]) == pytest.approx(error, rel=1e-4)
    assert 1 < float(figures["perplexity"]) <= 16
    assert "used codes 16 of 16" in output.out


def test_the_file_has_its_provenance(latents: Path, tmp_path: Path) -> None:
    out = tmp_path / "book.safetensors"
    assert train(latents, out, "--quiet", "--decay=0.9", "--beta=0.5", "--seed=3") == 0
    codebook = load_codebook(out)
    assert (codebook.arguments["decay"], codebook.arguments["beta"]) == (0.9, 0.5)
    story = codebook.provenance
    assert story["latents"]["file"] == "latents.npy"
    assert story["latents"]["shape"] == [2, 3, 20, 25]
    assert story["latents"]["layout"] == "channels_first"
    assert story["options"]["seed"] == 3
    assert story["options"]["steps"] == 30
    assert story["quality"]["used_codes"] == 16
    assert str(tmp_path) not in str(story)
    # The same file and seed give the same bytes as before there were data sets.
    assert story.keys() == {"made_by", "latents", "options", "quality"}
    assert story["latents"].keys() == {"file", "sha256", "shape", "dtype", "layout"}


@pytest.mark.parametrize("kind", ["ema", "vq"])
def test_the_file_has_statistics_of_its_latents(latents: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "book.safetensors"
    assert train(latents, out, "--quiet", f"--kind={kind}") == 0
    codebook = load_codebook(out)
    found = Tokenizer.load(out, device="cpu").encode(np.load(latents))
    assert codebook.statistics is not None
    assert codebook.statistics.rows == 1000
    assert np.array_equal(codebook.statistics.usage, [*np.bincount(found.ravel(), minlength=16), 0])
    assert codebook.statistics.error == pytest.approx(codebook.provenance["quality"]["mean_squared_error"], rel=1e-6)


@pytest.mark.parametrize("kind", ["ema", "vq"])
def test_the_same_seed_gives_the_same_bytes(latents: Path, tmp_path: Path, kind: str) -> None:
    one, two, other = (tmp_path / f"{name}.safetensors" for name in ("one", "two", "other"))
    for out, seed in ((one, 5), (two, 5), (other, 6)):
        assert train(latents, out, "--quiet", f"--kind={kind}", f"--seed={seed}") == 0
    assert one.read_bytes() == two.read_bytes()
    assert one.read_bytes() != other.read_bytes()


def test_stderr_that_is_no_terminal_gets_lines(
    latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(latents, tmp_path / "book.safetensors") == 0
    output = capsys.readouterr().err
    read, output = output.split("\n", 1)
    assert read == "latents (2, 3, 20, 25) read channels first: 3 channels"
    assert re.fullmatch(r"training: 30 of 30 steps, mean squared error \S+, perplexity \S+, reseeded 0\n", output)
    monkeypatch.setattr("vqserve_tools.progress._SECONDS_PER_LINE", 0)
    assert train(latents, tmp_path / "book.safetensors", "--force") == 0
    output = capsys.readouterr().err
    assert "k-means++: 16 of 16 codes\n" in output
    assert "training: 2 of 30 steps, mean squared error" in output
    assert output.count("training: 30 of 30 steps") == 1
    assert "measuring: 1000 of 1000 rows\n" in output
    assert "\r" not in output


def test_a_terminal_gets_a_bar(latents: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    options = ["--num-codes=16", "--steps=30", "--device=cpu"]
    command = [sys.executable, "-m", "vqserve_tools", "train", latents, "-o", tmp_path / "b.safetensors", *options]
    with open(ours, "rb", buffering=0) as terminal, subprocess.Popen(command, stderr=theirs) as process:  # noqa: PTH123
        os.close(theirs)
        output = b""
        # A pseudo-terminal whose other side is closed cannot be read any more.
        with contextlib.suppress(OSError):
            while more := terminal.read(1 << 16):
                output += more
    assert process.returncode == 0
    assert b"\rtraining: 100%" in output
    assert b"perplexity" in output


def test_quiet_is_quiet(latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(latents, tmp_path / "book.safetensors", "--quiet", "--init=sample") == 0
    assert capsys.readouterr().err == ""


def test_an_existing_file_is_replaced_only_by_force(
    latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "book.safetensors"
    out.write_bytes(b"mine")
    assert train(latents, out, "--quiet") == 1
    assert out.read_bytes() == b"mine"
    assert f"error: {out} is there already: pass --force" in capsys.readouterr().err
    assert train(latents, out, "--quiet", "--force") == 0
    load_codebook(out)


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.zeros((15, 4), np.float32), "z.npy: 15 rows are too few for 16 codes"),
        (np.zeros((0, 4), np.float32), "0 rows are too few"),
        (np.zeros((99, 4), np.float32), "1 distinct"),
        (np.zeros(99, np.float32), "2 to 5 axes, not 1"),
        (np.zeros((99, 4), np.int64), "not int64"),
        (np.where(np.arange(400).reshape(100, 4) == 9, np.nan, 0), "z.npy: latents[2, 1] is nan"),
    ],
)
def test_unusable_latents_are_one_line_and_exit_1(
    tmp_path: Path, array: np.ndarray, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "z.npy", array)
    out = tmp_path / "book.safetensors"
    assert train(tmp_path / "z.npy", out, "--quiet") == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert text in output.err
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--num-codes=0"], "error: --num-codes must be at least 1, not 0"),
        (["--decay=2"], "error: --decay must be at least 0 and less than 1, not 2.0"),
        (["--layout=channels_last", "--num-codes=999"], "latents.npy: 120 rows are too few for 999 codes"),
    ],
)
def test_options_that_do_not_fit_are_exit_1(
    latents: Path, tmp_path: Path, more: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(latents, tmp_path / "book.safetensors", "--quiet", *more) == 1
    output = capsys.readouterr().err
    assert text in output
    assert output.count("\n") == 1


def test_the_layout_is_printed_if_none_was_given(
    latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, flat = tmp_path / "book.safetensors", tmp_path / "flat.npy"
    np.save(flat, np.load(latents).reshape(-1, 3))
    np.save(tmp_path / "sound.npy", np.load(latents).reshape(2, 500, 3))
    for source, more, read in (
        (latents, [], "latents (2, 3, 20, 25) read channels first: 3 channels"),
        (tmp_path / "sound.npy", [], "latents (2, 500, 3) read channels last: 3 channels"),
        (latents, ["--layout=channels_first"], None),
        (latents, ["--quiet"], None),
        (flat, [], None),
    ):
        assert train(source, out, "--force", *more) == 0
        output = capsys.readouterr().err.splitlines()
        assert [line for line in output if " read " in line] == ([read] if read else [])


def test_a_missing_file_or_folder_is_one_line(
    latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "none.npy", tmp_path / "book.safetensors") == 1
    assert train(latents, tmp_path / "none" / "book.safetensors") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "none.npy" in lines[0]
    assert "there is no folder" in lines[1]


def test_a_folder_that_cannot_be_written_is_an_error_before_the_training(
    latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(job, "train", lambda *arguments, **options: pytest.fail("it was trained"))
    assert train(latents, tmp_path / "book.safetensors") == 1
    assert f"cannot write into the folder {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--kind=gumbel"], ["--steps=1", "--epochs=1"], ["--layout=nchw"], ["--speed=9"]])
def test_wrong_usage_is_exit_2(latents: Path, tmp_path: Path, more: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(latents), "-o", str(tmp_path / "book.safetensors"), *more])
    assert stopped.value.code == 2


def test_help_needs_no_torch() -> None:
    code = "import sys; from vqserve_tools.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass\n"
    result = subprocess.run(
        [sys.executable, "-c", f"{code}print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert "--num-codes K" in result.stdout
    assert result.stdout.splitlines()[-1] == "False"
