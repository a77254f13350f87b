"""`vqserve bench`, end to end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from vqserve import __version__
from vqserve_client.cli import main

QUICK = ["--warmup", "0.1", "--window", "0.1", "--max-windows", "3"]


@pytest.fixture
def bench(capsys, monkeypatch):
    """Run it in this process: bench(target, ...) -> (exit code, stdout, stderr)."""
    monkeypatch.delenv("VQSERVE_CODEBOOK", raising=False)

    def run(target, *arguments):
        try:
            code = main(["bench", "--target", target, *QUICK, *map(str, arguments)])
        except SystemExit as ended:
            code = ended.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def one_line(err):
    return err.startswith("vqserve: error: ") and err.count("\n") == 1 and err.endswith("\n")


def test_table_json_and_plot(bench, real, tmp_path):
    files = tmp_path / "bench.json", tmp_path / "bench.png"
    arguments = ["--concurrency", 1, 3, "--grid", "1x4x4", "--grid", "2x8", "--json", files[0], "--plot", files[1]]
    code, out, err = bench(real, *arguments)
    assert (code, err) == (0, "")
    title, empty, _, heads, *rows = out.splitlines()
    assert title == "encode 1x4x4, 2x8 tokens, float32, random data; codebook 'demo': ema, 4096 x 16"
    assert empty == ""
    assert heads.startswith("load ")
    assert [row.split()[:2] for row in rows] == [["concurrency", "1"], ["concurrency", "3"]]
    run = json.loads(files[0].read_text())
    assert list(run) == ["format", "began", "versions", "client", "target", "codebook", "settings", "loads"]
    assert (run["format"], run["versions"]["vqserve"], run["target"]) == (1, __version__, real)
    assert len(run["codebook"]["digest"]) == 64
    assert run["settings"]["grids"] == [[1, 4, 4], [2, 8]]
    assert run["settings"]["window_s"] == 0.1
    assert [one["load"] for one in run["loads"]] == [
        {"concurrency": 1, "kind": "concurrency"},
        {"concurrency": 3, "kind": "concurrency"},
    ]
    for one in run["loads"]:
        assert set(one["latency_ms"]) == {"avg", "p50", "p90", "p95", "p99", "max"}
        assert set(one["server"]) == {"queue_ms", "compute_ms", "total_ms", "batch_requests", "batch_rows"}
        assert (one["errors"], one["dropped"]) == ({}, 0)
        assert one["requests"] == sum(window["requests"] for window in one["windows"][-3:])
        assert one["tokens_per_s"] == pytest.approx(16 * one["requests_per_s"])
    assert files[1].read_bytes().startswith(b"\x89PNG\r\n")
    code, out, err = bench(real, *arguments)
    assert (code, out) == (1, "")
    assert "bench.json exists: --force replaces it" in err
    assert bench(real, "--concurrency", 1, "--plot", files[1], "--force")[0] == 0


@pytest.mark.parametrize(
    "how",
    [
        ["--rate", "100"],
        ["--concurrency", "2", "--streams", "2", "--method", "decode", "--dtype", "float16"],
        ["--concurrency", "2", "--connections", "2", "--dtype", "bfloat16", "--layout", "channels_last"],
        ["--concurrency", "2", "--processes", "2"],
    ],
    ids=" ".join,
)
def test_ways(bench, real, how):
    code, out, err = bench(real, "--grid", "1x2x2", *how)
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 5


def test_requests_that_fail_are_an_error(bench, tiny, failing, tmp_path):
    # Not the first, which is no part of the measurement.
    tiny.script.extend([None, None, failing("INTERNAL", "a line\nand another\x1b[31m")])
    code, out, err = bench(tiny.target, "--concurrency", 1, "--grid", 4, "--json", tmp_path / "x.json")
    assert code == 1
    assert out.splitlines()[-1].partition("  not stable")[0].split()[-1] == "1"
    assert one_line(err)
    assert f"1 requests failed: 1 INTERNAL (a line and another\\x1b[31m) (server {tiny.target})" in err
    assert json.loads((tmp_path / "x.json").read_text())["loads"][0]["errors"] == {"INTERNAL": 1}


def test_errors_before_anything_is_measured(bench, tiny, failing, tmp_path, monkeypatch):
    for arguments, text in (
        (["--codebook", "x"], "no codebook 'x' is served"),
        (["--digest", "0" * 64], f"not '{'0' * 64}'"),
        (["--grid", "9999x9999"], "does not fit a message"),
        (["--data", tmp_path / "missing.npy"], "missing.npy: there is no such file"),
        (["--json", tmp_path / "nowhere" / "x.json"], "no folder"),
        (["--plot", tmp_path / "x.gif"], "must end in .png, .svg or .pdf"),
        (["--streams", "1"], "are client and server of the same version?"),
    ):
        code, out, err = bench(tiny.target, *arguments)
        assert code == 1
        assert one_line(err), err
        assert text in err
        # At most the table's head.
        assert "concurrency" not in out
    tiny.script.append(failing("INVALID_ARGUMENT", "latents[0] is nan"))
    assert "latents[0] is nan" in bench(tiny.target, "--concurrency", 1)[2]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = bench(tiny.target, "--plot", tmp_path / "x.png")
    assert code == 1
    assert "without matplotlib: pip install 'vqserve[plot]'" in err


def test_a_server_that_is_not_there(bench):
    code, out, err = bench("127.0.0.1:1")
    assert (code, out) == (1, "")
    assert one_line(err)
    assert "is the server running" in err


@pytest.mark.parametrize(
    "wrong",
    [
        ["--grid", "1x0x2"],
        ["--grid", "1x2x3x4x5"],
        ["--grid", "1,2"],
        ["--concurrency", "0"],
        ["--concurrency", "1", "--rate", "1"],
        ["--rate", "0"],
        ["--rate", "inf"],
        ["--window", "0"],
        ["--max-windows", "0"],
        ["--stability", "-1"],
        ["--processes", "0"],
        ["--dtype", "int8"],
        ["--seed", "x"],
    ],
    ids=" ".join,
)
def test_wrong_usage(bench, wrong):
    code, out, err = bench("127.0.0.1:1", *wrong)
    assert (code, out) == (2, "")
    assert err.startswith("vqserve bench: error: ")
    assert err.endswith("; `vqserve bench --help` lists the options\n")
    assert err.count("\n") == 1


def test_progress(bench, tiny):
    code, out, err = bench(tiny.target, "--concurrency", 1, "--grid", 4, "--progress")
    assert code == 0
    assert "warm-up" in err
    assert "concurrency 1: window 3 of at most 3, " in err
    assert "window" not in out


@pytest.mark.parametrize(
    ("number", "code", "processes"), [(signal.SIGINT, 130, 1), (signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 1)]
)
def test_interrupted(tiny, tmp_path, number, code, processes):
    arguments = ["--concurrency", "2", "3", "--warmup", "0.1", "--window", "0.1", "--max-windows", "100000"]
    arguments += ["--stability", "1e-9", "--progress", "--processes", str(processes), "--grid", "4"]
    arguments += ["--target", tiny.target, "--json", str(tmp_path / "x.json")]
    process = subprocess.Popen(
        [sys.executable, "-m", "vqserve_client", "bench", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    seen = ""
    while "window 2 of" not in seen and (more := process.stderr.read(1)):
        seen += more
    process.send_signal(number)
    out, err = process.communicate(timeout=200)
    assert process.returncode == code
    assert "Traceback" not in seen + err
    if number == signal.SIGINT:
        assert out.splitlines()[-1].startswith("concurrency 2 ")
        assert len(json.loads((tmp_path / "x.json").read_text())["loads"]) == 1
