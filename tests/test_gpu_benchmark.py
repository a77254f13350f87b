"""benchmarks/gpu.py, from end to end without a GPU: what a machine with one runs must not fail there first."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(folder, *arguments):
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--device", "cpu", "--machine", "test", "--out", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
def test_it_checks_and_times_everything(tmp_path):
    sizes = ["--minutes", "5", "--exact-rows", "4000", "--rows", "64", "1", "--workers", "1", "--seconds", "0.2"]
    printed = run(tmp_path, *sizes, "--shapes", "tiny", "odd", "ldm-f4", "--peers", "torch tiled")
    assert printed.splitlines()[-1].endswith("done")
    report = (tmp_path / "gpu-test.md").read_text()
    assert re.findall(r"^## (.*)", report, re.MULTILINE) == ["Exactness", "Search", "Server"]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.splitlines()]
    exact = [line for line in cells if len(line) > 4 and line[1] in ("l2", "dot")]
    assert {(line[0], line[1]) for line in exact} == {
        (book, objective) for book in ("tiny 16x4", "odd 1000x17", "ldm-f4 8192x3") for objective in ("l2", "dot")
    }
    assert all(set(line[4:-1]) == {"0"} and line[-1].startswith("0 of ") for line in exact)
    # The near-ties are near.
    assert all(float(line[3].rstrip("%")) > 2 for line in exact)
    assert sum(int(line[2]) for line in exact) >= 4000
    searched = [line for line in cells if line[0] == "ldm-f4 8192x3" and len(line) == 6]
    assert [line[1] for line in searched] == ["64", "1"]
    assert all(float(line[2]) > 0 and "torch tiled" in line[4] for line in searched)
    [served] = [line for line in cells if line[0] == "tiny 1 x encode fp32"]
    assert all(float(cell.split()[0]) > 0 for cell in served[1:])


def test_it_ends_when_time_is_up_with_what_it_has(tmp_path):
    assert "time is up" in run(tmp_path, "--minutes", "0", "--exact-rows", "100")
    assert not list(tmp_path.iterdir())
