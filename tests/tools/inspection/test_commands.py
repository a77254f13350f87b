"""`vqserved inspect` as it is called."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vqserve_server.codebooks import load_codebook, save_codebook
from vqserve_server.quantizers import LookupFreeQuantizer, VectorQuantizer, VectorQuantizerWithInputProjection
from vqserve_tools import cli

ROOT = Path(__file__).parents[3]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def files(make_quantizer, latents_of, tmp_path):
    """Return the paths of a codebook of that kind, and of latents for it."""

    def write(name, **provenance):
        quantizer = make_quantizer(name)
        book, latents = tmp_path / "c.safetensors", tmp_path / "z.npy"
        save_codebook(quantizer, book, provenance=provenance)
        np.save(latents, latents_of(quantizer))
        return str(book), str(latents)

    return write


def run(capsys, *arguments):
    status = cli.main(["inspect", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def size_of(png):
    """Return a PNG file's width and height, and whether it is more than one colour."""
    content = Path(png).read_bytes()
    assert content.startswith(PNG)
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def test_a_codebook_alone(tmp_path, capsys):
    path = tmp_path / "c.safetensors"
    digest = save_codebook(VectorQuantizer(300, 3), path, provenance={"who": "a\x1b[2Jb\nc", "k\x1b[2J": 1})
    status, text, err = run(capsys, path)
    assert (status, err) == (0, "")
    for line in ("codes ", "300 of width 3, float32", digest, "dead-looking", "300 of 300"):
        assert line.strip() in text
    # What a file says of itself does not move the cursor.
    assert "a\\x1b[2Jb\\nc" in text
    assert "\x1b" not in text
    status, text, _ = run(capsys, path, "--json")
    report = json.loads(text)
    assert report["format"] == 1
    assert report["norms"].keys() == {"min", "median", "max"}
    assert report["provenance"]["who"] == "a\x1b[2Jb\nc"
    assert report["fit"] is None


def test_latents(files, capsys):
    book, latents = files("vq")
    status, text, err = run(capsys, book, "--latents", latents)
    assert (status, err) == (0, "")
    report = json.loads(run(capsys, book, "--latents", latents, "--json")[1])
    fit = report["fit"]
    assert fit["latents"] == {
        "shape": [500, 3],
        "dtype": "float32",
        "layout": "channels_last",
        "tokens": 500,
        "data_set": None,
    }
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in text.splitlines() if not line.startswith(" "))
    usage, error = fit["usage"][0], fit["error"]
    assert lines["latents"].startswith("500 tokens: 500 x 3 float32, channels_last")
    assert f"{usage['used']} (" in lines["usage"]
    assert f"{usage['dead']} dead" in lines["usage"]
    assert lines["perplexity"].startswith(f"{usage['perplexity']:.6g}, ")
    assert lines["error"].startswith(f"{error['mean_squared']:.6g} mean squared, ")
    assert f"SNR {error['snr_db']:.2f} dB" in lines["error"]
    for name in ("float16", "bfloat16"):
        assert f"both {fit['rounded'][name]['both']['tokens']} (" in lines[f"in {name}"]
    assert lines["re-checked"].startswith(f"{fit['rechecked'][0]['float64']} (")


def test_every_kind_in_80_columns(quantizer, saved, latents_of, tmp_path, capsys, monkeypatch):
    saved(quantizer, note="x" * 200)
    np.save(tmp_path / "z.npy", latents_of(quantizer))
    for columns in (80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        status, text, _ = run(capsys, tmp_path / "book.safetensors", "--latents", tmp_path / "z.npy")
        assert status == 0
        assert max(map(len, text.splitlines())) <= columns
    if quantizer.num_quantizers > 1:
        table = text[text.index("\nstage ") :].splitlines()[2 : 2 + quantizer.num_quantizers]
        assert [line.split()[0] for line in table] == [str(n + 1) for n in range(quantizer.num_quantizers)]
    status, text, _ = run(capsys, tmp_path / "book.safetensors", "--latents", tmp_path / "z.npy", "--json")
    assert json.loads(text)["kind"] == quantizer.kind


def test_a_layout_is_the_codebook_s_unless_it_is_given(make_quantizer, saved, tmp_path, capsys):
    saved(make_quantizer("rvq"))
    latents = tmp_path / "z.npy"
    np.save(latents, np.zeros((2, 3, 7), np.float32))
    asked = (tmp_path / "book.safetensors", "--json", "--latents", latents)
    assert json.loads(run(capsys, *asked)[1])["fit"]["latents"]["tokens"] == 14
    status, _, err = run(capsys, *asked, "--layout", "channels_last")
    assert (status, err.count("\n")) == (1, 1)
    assert f"{latents}: latents of shape (2, 3, 7) have 7 channels in layout channels_last" in err
    assert err.endswith("the codebook takes 3: should it be --layout channels_first?\n")
    bad = np.zeros((2, 3, 7), np.float32)
    bad[1, 2, 3] = np.nan
    np.save(latents, bad)
    assert run(capsys, *asked)[::2] == (
        1,
        f"vqserved: error: {latents}: latents[1, 2, 3] is nan: no code stands for it, find out where it comes from\n",
    )
    status, _, err = run(capsys, *asked[:2], "--layout", "channels_last")
    assert status == 1
    assert err == "vqserved: error: --layout says where the channels of the latents are: give --latents too\n"


@pytest.mark.parametrize("name", ["vq", "vq_remap", "gumbel", "rvq", "fsq", "residual_fsq_back", "lfq_spherical"])
def test_a_plot(name, files, tmp_path, capsys):
    book, latents = files(name)
    both, alone = tmp_path / "both.png", tmp_path / "alone.png"
    status, _, err = run(capsys, book, "--latents", latents, "--plot", both)
    assert (status, err) == (0, "")
    panels = 2 * (name not in {"fsq", "residual_fsq_back", "lfq_spherical"}) + 2 - (name == "gumbel")
    assert size_of(both) == (1210, 440 * ((panels + 1) // 2))
    status, _, err = run(capsys, book, "--plot", alone)
    if panels == 2:
        assert status == 1
        assert "without latents there is nothing to draw" in err
        assert not alone.exists()
    else:
        assert size_of(alone) == (1210, 440)


def test_a_token_beyond_float32_is_named_with_its_file(tmp_path, capsys):
    path, latents = tmp_path / "c.safetensors", tmp_path / "z.npy"
    quantizer = VectorQuantizerWithInputProjection(6, 40, 2).requires_grad_(False)
    quantizer.proj_in.weight.fill_(1)
    save_codebook(quantizer, path)
    array = np.zeros((5, 6, 2, 2), np.float32)
    array[3, :, 1, 0] = 3.4e38
    np.save(latents, array)
    status, _, err = run(capsys, path, "--latents", latents)
    assert status == 1
    found = f"{latents}: the projection of token [3, 1, 0] leaves the range of float32"
    assert err == f"vqserved: error: {found}: scale the latents down\n"


def test_a_plot_is_not_replaced_unasked(files, tmp_path, capsys):
    book, _ = files("vq")
    plot = tmp_path / "p.png"
    plot.write_bytes(b"mine")
    status, out, err = run(capsys, book, "--plot", plot)
    assert (status, out) == (1, "")
    assert err == f"vqserved: error: {plot} is there already: pass --force to replace it\n"
    assert plot.read_bytes() == b"mine"
    assert run(capsys, book, "--plot", plot, "--force")[0] == 0
    assert size_of(plot) == (1210, 440)
    (tmp_path / "folder.png").mkdir()
    for path, text in ((tmp_path / "folder.png", "is a folder"), (tmp_path / "none" / "p.png", "there is no folder")):
        status, _, err = run(capsys, book, "--plot", path)
        assert status == 1
        assert text in err


def test_a_plot_is_a_png(files, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(capsys, files("vq")[0], "--plot", "p.svg")
    assert stopped.value.code == 2
    assert "'p.svg' must end in .png" in capsys.readouterr().err


def test_without_matplotlib_it_is_named(files, tmp_path, capsys, monkeypatch):
    book, _ = files("vq")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, out, err = run(capsys, book, "--plot", tmp_path / "p.png")
    assert (status, out) == (1, "")
    assert err == "vqserved: error: p.png cannot be drawn without matplotlib: pip install 'vqserve[plot]'\n"
    # It is needed for nothing else.
    assert run(capsys, book)[0] == 0


def test_odd_codebooks_can_be_drawn(tmp_path, capsys):
    latents = tmp_path / "z.npy"
    np.save(latents, np.zeros((5, 2), np.float32))
    quantizers = {
        "one": VectorQuantizer(1, 2),
        "equal": VectorQuantizer(9, 2),
        "wide": VectorQuantizer(9, 2),
        "bits": LookupFreeQuantizer(2, "big"),
    }
    quantizers["equal"].embedding.weight.data.fill_(1.0)
    quantizers["wide"].embedding.weight.data[0] = 1e6
    for name, quantizer in quantizers.items():
        save_codebook(quantizer, tmp_path / f"{name}.safetensors")
        plot = tmp_path / f"{name}.png"
        assert run(capsys, tmp_path / f"{name}.safetensors", "--latents", latents, "--plot", plot)[0] == 0
        assert size_of(plot)[0] == 1210


def test_long_provenance_is_cut_to_a_line_each(tmp_path, capsys, monkeypatch):
    path = tmp_path / "c.safetensors"
    provenance = {"options": {f"option {i}": i for i in range(99)}, "n" * 999: "x" * 999, "note": "short"}
    save_codebook(VectorQuantizer(300, 3, loss_key="key" * 99), path, provenance=provenance)
    monkeypatch.setenv("COLUMNS", "100")
    lines = run(capsys, path)[1].splitlines()
    assert max(map(len, lines)) == 100
    names = ("provenance options ", "provenance nnn", "argument loss_key ")
    assert [sum(line.startswith(name) and line.endswith("...") for line in lines) for name in names] == [1, 1, 1]
    assert sum(line.startswith("provenance note ") and line.endswith(" short") for line in lines) == 1
    # What vqserve says itself is whole, on a narrow terminal too.
    monkeypatch.setenv("COLUMNS", "40")
    assert load_codebook(path).digest in run(capsys, path)[1]
    assert json.loads(run(capsys, path, "--json")[1])["provenance"] == provenance


@pytest.mark.parametrize("content", [b"", b"noise" * 99])
def test_no_codebook(tmp_path, capsys, content):
    path = tmp_path / "c.safetensors"
    path.write_bytes(content)
    status, out, err = run(capsys, path)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert str(path) in err


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "none.npy: it is not a .npy file"),
        (None, "none.npy: there is no such file"),
        (b"noise" * 99, "none.npy: it is not a .npy file"),
    ],
)
def test_no_latents(files, tmp_path, capsys, content, text):
    book, _ = files("vq")
    path = tmp_path / "none.npy"
    if content is not None:
        path.write_bytes(content)
    status, out, err = run(capsys, book, "--latents", path)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert text in err


@pytest.mark.filterwarnings("error")
def test_latents_whose_squares_leave_float64(files, tmp_path, capsys):
    book, latents = files("vq")
    rows = np.zeros((3, np.load(latents).shape[1]))
    rows[0, 0], rows[1, 0] = 1e300, -1e155
    np.save(tmp_path / "wide.npy", rows)
    status, out, err = run(capsys, book, "--latents", tmp_path / "wide.npy", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["fit"]["error"]["variance"] is None


def test_progress_is_for_terminals(files, capsys, monkeypatch):
    book, latents = files("vq")
    assert run(capsys, book, "--latents", latents)[2] == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    _, out, err = run(capsys, book, "--latents", latents)
    assert "measuring codes" in err
    assert "encoding" in err
    assert "encoding" not in out


def test_every_field_is_on_the_page(quantizer, saved, latents_of, tmp_path, capsys):
    saved(quantizer)
    np.save(tmp_path / "z.npy", latents_of(quantizer))
    text = run(capsys, tmp_path / "book.safetensors", "--json", "--latents", tmp_path / "z.npy")[1]
    page = (ROOT / "docs/inspecting.md").read_text()

    def fields(value):
        if isinstance(value, dict):
            yield from value
            for key, one in value.items():
                if key not in {"arguments", "provenance", "search"}:
                    yield from fields(one)
        elif isinstance(value, list):
            for one in value:
                yield from fields(one)

    assert [name for name in dict.fromkeys(fields(json.loads(text))) if f"`{name}`" not in page] == []


def test_the_command_needs_no_matplotlib_before_it_draws(tmp_path):
    save_codebook(VectorQuantizer(3, 3), tmp_path / "c.safetensors")
    code = f"""
import sys
from vqserve_tools.cli import main
assert main(["inspect", {str(tmp_path / "c.safetensors")!r}]) == 0
assert "matplotlib" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_computed_codes_have_no_duplicates_to_count_and_values_are_the_file_s(files, capsys):
    book, _ = files("lfq", quality={"x": None, "y": True})
    _, out, _ = run(capsys, book)
    assert "duplicates" not in out
    assert "dead-looking" not in out
    assert re.search(r"^argument input_dim +null$", out, re.MULTILINE)
    assert re.search(r"^argument spherical +false$", out, re.MULTILINE)
    assert re.search(r'^provenance quality +{"x": null, "y": true}$', out, re.MULTILINE)


# Statistics for a server.


def test_statistics_are_saved_and_the_digest_stays(quantizer, saved, latents_of, tmp_path, capsys):
    saved(quantizer, note="mine")
    book = tmp_path / "book.safetensors"
    before = load_codebook(book)
    np.save(tmp_path / "z.npy", latents_of(quantizer))
    status, text, err = run(capsys, book, "--latents", tmp_path / "z.npy", "--save-stats", "--json")
    assert (status, err) == (0, "")
    after = load_codebook(book)
    assert (after.digest, after.provenance, after.arguments) == (before.digest, before.provenance, before.arguments)
    fit, statistics = json.loads(text)["fit"], json.loads(text)["statistics"]
    assert statistics["rows"] == after.statistics.rows == fit["latents"]["tokens"]
    assert statistics["source"] == "z.npy"
    if getattr(quantizer, "used", None) is not None:
        # The fit is about full codes, the statistics are about what is reported.
        return
    assert statistics["used"] == [usage["used"] for usage in fit["usage"]]
    if fit["error"] is None:
        assert statistics["error"] is None
    else:
        assert statistics["error"] == pytest.approx(fit["error"]["mean_squared"], rel=1e-9)


def test_statistics_are_replaced_and_shown(files, tmp_path, capsys):
    book, latents = map(Path, files("vq"))
    assert "statistics" not in run(capsys, book)[1]
    assert json.loads(run(capsys, book, "--json")[1])["statistics"] is None
    for rows in (500, 20):
        np.save(latents, np.load(latents)[:rows])
        text = run(capsys, book, "--latents", latents, "--save-stats")[1]
        error = load_codebook(book).statistics.error
        assert f"statistics    of {rows} tokens, error {error:.6g}: {latents.name}\n" in text
    assert f"statistics    of 20 tokens, error {error:.6g}: {latents.name}\n" in run(capsys, book)[1]


def test_a_link_to_a_codebook_stays_a_link(files, tmp_path, capsys):
    book, latents = map(Path, files("vq"))
    link = tmp_path / "link.safetensors"
    link.symlink_to(book.name)
    assert run(capsys, link, "--latents", latents, "--save-stats")[0] == 0
    assert link.is_symlink()
    assert load_codebook(book).statistics.rows == 500


def test_what_cannot_be_saved_is_an_error_before_the_work(files, tmp_path, capsys):
    book, latents = map(Path, files("vq"))
    content = book.read_bytes()
    for asked, reason in (
        ((book, "--save-stats"), "--save-stats keeps what is measured on latents: give --latents too"),
        ((book, book, "--latents", latents, "--save-stats"), "--save-stats writes into one file: name one"),
    ):
        assert run(capsys, *asked) == (1, "", f"vqserved: error: {reason}\n")
    np.save(latents, np.zeros((4, 7), np.float32))
    assert run(capsys, book, "--latents", latents, "--save-stats")[0] == 1
    assert book.read_bytes() == content
