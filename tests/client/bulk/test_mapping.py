"""`--map`: the user's function between a reader and the server."""

from __future__ import annotations

import json
import os
import signal
import sys

import numpy as np
import pytest

from support.waiting import eventually

FUNCTIONS = """
import io
import os
import time

import numpy as np


def latents(item):
    text = item.fields["txt"].decode()
    if text == "none":
        return None
    if text == "object":
        raise RuntimeError(f"{io.BytesIO()} is no picture")
    return np.full((1, 4, 2, 2), float(text), np.float32)


def halves(item):
    return np.asarray(item.array[(slice(None),) * 4]) / 2


def dies(item):
    os._exit(1)


def leaves(item):
    raise SystemExit(0)


buffer = np.empty((1, 4, 2, 2), np.float32)


def fills_a_buffer(item):
    buffer[...] = len(item.key) / 10
    return buffer


def hangs(item):
    with open("pids", "a") as pids:
        print(os.getpid(), file=pids)
    time.sleep(1000)
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """A module `functions` in the current folder, and a folder of texts."""
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.delitem(sys.modules, "functions", raising=False)
    (tmp_path / "texts").mkdir()
    for name, text in (("a", "0.5"), ("b", "none"), ("c", "words"), ("d", "-1"), ("e", "object")):
        (tmp_path / "texts" / f"{name}.txt").write_text(text)


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize("processes", [0, 2])
def test_a_function_makes_the_latents(vqserve, client, tmp_path, processes):
    options = ("--map", "functions:latents", "--map-processes", processes)
    assert vqserve("encode", tmp_path / "texts", "-o", tmp_path / "tokens", *options)[0] == 3
    for name, value in (("a", 0.5), ("d", -1)):
        expected = client.encode(np.full((1, 4, 2, 2), value, np.float32))
        assert (np.load(tmp_path / "tokens" / f"{name}.npy") == expected).all()
    lines = map(json.loads, (tmp_path / "tokens" / "errors.jsonl").read_text().splitlines())
    assert {line["key"]: line["reason"] for line in lines} == {
        "b": "map: TypeError: it returned NoneType, not an array of numbers",
        "c": "map: ValueError: could not convert string to float: 'words'",
        "e": "map: RuntimeError: <_io.BytesIO object> is no picture",
    }


@pytest.mark.usefixtures("functions")
def test_arrays_reach_it_as_items(vqserve, client, source, arrays, tmp_path):
    assert vqserve("encode", source, "-o", tmp_path / "tokens", "--map", "functions:halves")[0] == 0
    assert (np.load(tmp_path / "tokens" / "b" / "c.npy") == client.encode(arrays["b/c"] / 2)).all()


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("functions", "--map must be MODULE:FUNCTION"),
        ("functions:", "--map must be MODULE:FUNCTION"),
        ("nowhere:f", "No module named 'nowhere'"),
        ("functions:f", "has no attribute 'f'"),
        ("functions:np", "it is not a function"),
    ],
)
def test_a_name_of_nothing(vqserve, tmp_path, name, problem):
    code, _, said = vqserve("encode", tmp_path / "texts", "-o", tmp_path / "tokens", "--map", name)
    assert code == 1
    assert problem in said


@pytest.mark.usefixtures("functions")
def test_a_process_that_dies(vqserve, tmp_path):
    options = ("--map", "functions:dies", "--map-processes", 1)
    code, _, said = vqserve("encode", tmp_path / "texts", "-o", tmp_path / "tokens", *options)
    assert code == 1
    assert "one of its processes ended" in said


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize("processes", [0, 1])
def test_a_function_that_ends_the_program_makes_bad_items(vqserve, tmp_path, processes):
    options = ("--map", "functions:leaves", "--map-processes", processes)
    code, _, said = vqserve("encode", tmp_path / "texts", "-o", tmp_path / "tokens", *options)
    assert code == 3
    assert "SystemExit: 0" in said


@pytest.mark.usefixtures("functions")
def test_a_function_may_return_the_same_memory_again(vqserve, client, tmp_path):
    for length in range(2, 20):
        (tmp_path / "texts" / f"{'x' * length}.txt").write_text("")
    options = ("--map", "functions:fills_a_buffer")
    assert vqserve("encode", tmp_path / "texts", "-o", tmp_path / "tokens", *options)[0] == 0
    for path in (tmp_path / "tokens").glob("*.npy"):
        expected = client.encode(np.full((1, 4, 2, 2), len(path.stem) / 10, np.float32))
        assert (np.load(path) == expected).all()


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_function_that_never_returns(start, tmp_path, processes, end):
    options = ("--map", "functions:hangs", "--map-processes", processes)
    process = start("encode", tmp_path / "texts", "-o", tmp_path / "tokens", *options)
    pids = tmp_path / "pids"
    eventually(lambda: pids.exists() and len(pids.read_text().splitlines()) >= max(1, processes))
    process.send_signal(end)
    _, said = process.communicate()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[end]
    if end != signal.SIGKILL:
        assert "the same command goes on from there" in said
    # Nothing of it is left.
    eventually(lambda: not any(_is_running(int(pid)) for pid in pids.read_text().split()))


def _is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
