"""What a start takes: time to the ready line, processor time and resident memory; and commands.

`python benchmarks/starting.py`; a part of `make bench-behaviour`. Each figure is the least of several starts: others on
the machine only add to it.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from vqserve_server.codebooks import save_codebook
from vqserve_server.quantizers import FiniteScalarQuantizer, VectorQuantizer

STARTS = 5


def starting(folder: Path) -> list[str]:
    """Start a server of a plain codebook, which needs no torch, and one of another kind; then commands."""
    plain, other = folder / "plain.safetensors", folder / "other.safetensors"
    torch.manual_seed(0)
    save_codebook(VectorQuantizer(16384, 4), plain)
    save_codebook(FiniteScalarQuantizer([8, 5, 5, 5]), other)
    lines = ["## Start", "", "| | ready, s | processor, s | resident, MiB |", "|---|---|---|---|"]
    for name, path in (("vq, 16384 x 4, on the CPU", plain), ("fsq, which needs torch", other)):
        ready, processor, resident = (
            min(values) for values in zip(*(_started(path) for _ in range(STARTS)), strict=True)
        )
        lines.append(f"| {name} | **{ready:.2f}** | {processor:.2f} | {resident:.0f} |")
    lines += ["", "| command | seconds | processor, s |", "|---|---|---|"]
    for words in (["--version"], ["--help"], ["inspect", str(plain)], ["inspect", str(other)]):
        seconds, processor = least([_run(words) for _ in range(STARTS)])
        shown = " ".join(Path(word).stem for word in words)
        lines.append(f"| `vqserved {shown}` | **{seconds:.2f}** | {processor:.2f} |")
    return lines


def least(runs: Sequence[Sequence[float]]) -> list[float]:
    """Return the least of each figure."""
    return [min(values) for values in zip(*runs, strict=True)]


def _started(path: Path) -> tuple[float, float, float]:
    began = time.monotonic()
    command = [sys.executable, "-m", "vqserve_tools", "serve", str(path), "--port", "0", "--metrics-port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        assert "ready" in server.stdout.readline()
        ready = time.monotonic() - began
        spent = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{server.pid}/status").read_text())
        server.send_signal(signal.SIGTERM)
    assert found is not None
    processor = (int(spent[11]) + int(spent[12])) / os.sysconf("SC_CLK_TCK")
    return ready, processor, int(found[1]) / 1024


def _run(words: Sequence[str]) -> tuple[float, float]:
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([sys.executable, "-m", "vqserve_tools", *words], check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print("\n".join(starting(Path(scratch))))
