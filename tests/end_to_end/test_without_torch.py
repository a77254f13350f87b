"""A CPU server of plain codebooks never loads torch, but for a codebook of another kind; nor do commands about one."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kinds import make
from support.waiting import eventually
from support.workers import children
from vqserve_client import Client
from vqserve_server.codebooks import save_codebook
from vqserve_server.quantizers import FiniteScalarQuantizer
from vqserve_server.search.native import levels

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc"),
    pytest.mark.skipif(not levels(), reason="the compiled search was not built for this platform"),
]
PLAIN = ("vq", "vq_channels_first", "vq_weight_norm", "ema", "gumbel", "cosine", "dot")
DEMO = Path(__file__).parents[2] / "server/vqserve_server/assets/demo.safetensors"


def has_torch(pid: int) -> bool:
    return "/libtorch" in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_server(vqserved: Callable[..., Any], tmp_path: Path, workers: int) -> None:
    quantizers = {name: make(name) for name in PLAIN}
    for name, quantizer in quantizers.items():
        save_codebook(quantizer, tmp_path / f"{name}.safetensors")
    # Every row is sampled, so that usage and error are counted, too.
    daemon = vqserved(tmp_path, "--device", "auto", "--workers", workers, "--sample-one-in", 1)
    parent = daemon.process.pid
    pids = list(children(parent).values()) if workers > 1 else [parent]
    latents = torch.randn(3000, 5, generator=torch.Generator().manual_seed(0))
    with Client(daemon.target) as client:
        for name, quantizer in quantizers.items():
            rows = latents[:, : quantizer.input_dim].contiguous()
            indices = client.encode(rows.numpy(), codebook=name)
            np.testing.assert_array_equal(indices, quantizer.encode(rows).numpy())
            for dtype in ("float32", "float16", "bfloat16"):
                decoded = client.decode(torch.from_numpy(indices.astype(np.int64)), codebook=name, dtype=dtype)
                assert torch.equal(
                    decoded, quantizer.decode(torch.from_numpy(indices.astype(np.int64))).to(decoded.dtype)
                )
        assert not any(map(has_torch, {parent, *pids}))
        fsq = FiniteScalarQuantizer([8, 5])
        save_codebook(fsq, tmp_path / "fsq.safetensors")
        daemon.process.send_signal(signal.SIGHUP)
        eventually(lambda: len(client.codebooks()) == len(PLAIN) + 1)
        rows = latents[:, :2].contiguous()
        np.testing.assert_array_equal(client.encode(rows.numpy(), codebook="fsq"), fsq.encode(rows).numpy())
    eventually(lambda: all(map(has_torch, pids)))


@pytest.mark.parametrize("arguments", [("--version",), ("--help",), ("serve", "--help"), ("inspect", DEMO)])
def test_a_command(arguments: tuple[object, ...]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "vqserve_tools", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=250)
    assert done.stdout
    assert not re.search(r"\| +(torch|grpc|prometheus_client|matplotlib)$", done.stderr, re.MULTILINE)
