"""One small encode takes few calls of ours: a reader can follow it, and it costs little."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

WALK = Path(__file__).parents[2] / "benchmarks/walk.py"
MOST_CALLS = 70
MOST_FILES = 18


def test_a_call_of_the_client_takes_at_most_70_calls_in_18_files():
    ended = subprocess.run([sys.executable, WALK, "--json"], capture_output=True, text=True, timeout=120, check=True)
    walks = {name: steps for name, steps in json.loads(ended.stdout).items() if "Client" in name}
    assert walks.keys() == {"Client.encode", "Client.decode", "AsyncClient.encode"}
    for name, steps in walks.items():
        calls = [step for step in steps if not step["resumed"] and (step["created"] or step["function"][-1] != ">")]
        listed = "\n".join(f"{step['file']}:{step['function']}" for step in calls)
        assert len(calls) <= MOST_CALLS, f"{name}: {len(calls)} calls\n{listed}"
        assert len({step["file"] for step in calls}) <= MOST_FILES, f"{name}\n{listed}"
