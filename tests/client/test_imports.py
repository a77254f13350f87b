"""The client needs nothing of the server's, and little time."""

from __future__ import annotations

import subprocess
import sys

import vqserve_client

PROGRAM = """
import sys

STRANGERS = {"torch", "scipy", "safetensors", "faiss", "einops", "matplotlib", "vqserve_server"}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in STRANGERS:
            raise ImportError(f"{name} must not be imported")

sys.meta_path.insert(0, Refuse())
import numpy as np
import vqserve_client, vqserve_bench.command, vqserve_client.cli
from vqserve_client import Client
with Client(sys.argv[1]) as client:
    indices = client.encode(np.ones((3, 4), np.float32))
    assert client.decode(indices, dtype="bfloat16").shape == (3, 8)
loaded = {name.partition(".")[0] for name in sys.modules}
print(sorted(loaded & {*STRANGERS, "tqdm"}))
"""


def test_the_client_works_where_torch_cannot_be_imported(tiny):
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, tiny.target], capture_output=True, text=True, timeout=200, check=False
    )
    assert (ended.stdout, ended.stderr) == ("[]\n", "")


def test_all_is_sorted_and_there():
    assert vqserve_client.__all__ == sorted(vqserve_client.__all__)
    assert all(hasattr(vqserve_client, name) for name in vqserve_client.__all__)
