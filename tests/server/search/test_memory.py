"""What a search takes beside codebook, rows and result, whatever the number of codes."""

import os
import subprocess
import sys

import pytest

from vqserve_server.search import available

MIB = 1 << 20
SCRIPT = """
import re, sys, torch
from vqserve_server.search import prepare
k, d, n = map(int, sys.argv[1:4])
searcher = prepare(torch.randn(k, d), backend=sys.argv[4])
rows = torch.randn(n, d)
searcher.search(rows[:16])
status = lambda key: int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
open("/proc/self/clear_refs", "w").write("5")
before = status("VmHWM")
searcher.search(rows)
print((status("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's counters of a process's memory")
@pytest.mark.parametrize("backend", [name for name in available("cpu") if name != "triton"])
def test_a_search_over_very_many_codes_takes_little_memory(backend):
    # All scores at once would be 192 MiB in float32.
    command = [sys.executable, "-c", SCRIPT, "262144", "64", "192", backend]
    # What is freed goes back at once, so that the peak is what was in use and not where an allocator happened to look.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=250, env=environment)
    assert int(done.stdout) <= 64 * MIB
