"""The compiled search of numpy arrays in a process that never imports torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from vqserve_server.search.native import levels
from vqserve_server.search.threads import search_threads

SCRIPT = """
import sys
import numpy as np
from vqserve_server.search import Objective, native, prepare_arrays
from vqserve_server.search.threads import search_threads
axis = np.arange(-6, 6, dtype=np.float32)
codes = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
twice = np.concatenate([codes, codes])
# Integers and halves: distances and scores are exact, and most rows are as near to eight codes.
rows = np.concatenate([codes + 0.5, codes, codes * 3])
distances = ((rows[:, None].astype(np.float64) - codes) ** 2).sum(axis=2)
for dtype in (np.float32, np.float64):
    assert (prepare_arrays(twice).search(rows.astype(dtype)) == distances.argmin(axis=1)).all()
dot = prepare_arrays(codes, objective=Objective.DOT, bias=-(codes * codes).sum(axis=1) / 2)
assert (dot.search(rows) == distances.argmin(axis=1)).all()
zeros = np.zeros((3, 3), np.float32)
assert (prepare_arrays(codes, objective=Objective.DOT).search(zeros) == 0).all()
assert (prepare_arrays(codes, objective=Objective.DOT, bias=codes[:, 0]).search(zeros) == codes[:, 0].argmax()).all()
assert prepare_arrays(codes.astype(np.float64)) is None
print(search_threads(), native.levels()[0], "torch" in sys.modules)
"""


def python(script, **environment):
    plain = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=plain | environment, capture_output=True, text=True, timeout=250, check=False)
    assert not done.returncode, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(not levels(), reason="the compiled search was not built for this platform")
def test_it_uses_the_threads_and_instructions_that_torch_would():
    of_torch = "import torch; print(torch.get_num_threads(), torch.backends.cpu.get_cpu_capability().lower())"
    assert python(SCRIPT) == [*python(of_torch), "False"]


@pytest.mark.skipif(len(levels()) < 2, reason="there is one instruction set")
@pytest.mark.parametrize("level", levels()[1:])
def test_a_variable_lowers_the_instruction_set_and_another_sets_the_threads(level):
    assert python(SCRIPT, ATEN_CPU_CAPABILITY=level, OMP_NUM_THREADS="3,1") == ["3", level, "False"]


def test_with_torch_its_number_of_threads_counts():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert search_threads() == before + 1
    finally:
        torch.set_num_threads(before)
