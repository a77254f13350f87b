"""What a large codebook takes of a server's memory, as a multiple of its own size.

    .venv/bin/python benchmarks/codebook_memory.py --codes 262144 --dim 256

It starts `vqserved serve` with the demo codebook, and then with one of random codes, and compares what is resident when
the server is ready, the peak until then, and what the first requests for each dtype add.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from vqserve_client import Client
from vqserve_server.codebooks import save_codebook
from vqserve_server.quantizers import VectorQuantizer


class Server:
    """A server of one codebook; none: the demo codebook."""

    def __init__(self, *codebooks: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vqserve_server", "serve", *map(str, codebooks), "--port", "0", "--device", "cpu"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        self.target = line.removeprefix("vqserved: ready on ").partition(",")[0]

    def mib(self, key: str) -> float:
        found = re.search(rf"{key}:\s+(\d+)", Path(f"/proc/{self._process.pid}/status").read_text())
        assert found is not None
        return int(found[1]) / 1024

    def stop(self) -> None:
        self._process.terminate()
        self._process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=262_144)
    parser.add_argument("--dim", type=int, default=256)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        path = Path(scratch) / "large.safetensors"
        save_codebook(VectorQuantizer(options.codes, options.dim), path)
        size = path.stat().st_size / 2**20
        empty = Server()
        base = empty.mib("VmRSS")
        empty.stop()
        server = Server(path)
        print(
            f"codebook {options.codes} x {options.dim}: {size:.0f} MiB; a server of the demo codebook: {base:.0f} MiB"
        )

        def report(what: str, key: str) -> None:
            more = server.mib(key) - base
            print(f"{what}: {more:.0f} MiB more, {more / size:.2f} times the codebook", flush=True)

        report("peak until it is ready", "VmHWM")
        report("when it is ready", "VmRSS")
        with Client(server.target, timeout=600) as client:
            latents = np.random.default_rng(0).standard_normal((100, options.dim), np.float32)
            indices = client.encode(latents)
            report("after an encode", "VmRSS")
            for dtype in ("float32", "float16", "bfloat16"):
                client.decode(torch.from_numpy(indices.astype(np.int64)), dtype=dtype)
                report(f"after a decode to {dtype}", "VmRSS")
        server.stop()


if __name__ == "__main__":
    main()
