"""The console of a real server with two workers: nothing of what it shows is invented here."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.certificates import free_port
from support.fake_metrics import FakeMetrics
from support.workers import children
from vqserve.errors import InvalidArgument
from vqserve_client import Client


def test_a_real_server(
    chromium: Any, console_of: Callable[..., Any], vqserved: Callable[..., Any], put: Callable[..., Any], tmp_path: Path
) -> None:
    tokenizer = put(tmp_path / "books" / "faces.safetensors")
    port = free_port()
    daemon = vqserved(tmp_path / "books", "--workers", 2, VQSERVE_METRICS_PORT=str(port))
    console = console_of(chromium.new_page(), FakeMetrics(), f"http://127.0.0.1:{port}/")
    console.page.goto(console.url)
    console.until(lambda: console.text("#state") == "Serving")
    assert [row[:3] for row in console.table("worker-rows")] == [["0", "Serving", "cpu"], ["1", "Serving", "cpu"]]
    [[name, kind, codes, dim, digest, *_]] = console.table("codebook-rows")
    assert (name, kind, codes, dim, digest) == ("faces", "vq", "40", "4", f"{tokenizer.digest}\nCopy")

    latents = np.random.default_rng(0).standard_normal((50_000, 4), dtype=np.float32)
    with Client(daemon.target) as client:

        def is_shown() -> bool:
            client.encode(latents)
            rates = [float(row[2]) for row in console.table("traffic-rows") if row[:2] == ["faces", "encode"]]
            return bool(rates) and rates[0] > 0

        console.until(is_shown)
        console.until(lambda: client.encode(latents) is not None and console.table("codebook-rows")[0][6] == "100%")
        assert "Live usage of faces: 100%" in console.page.get_attribute("#usage-faces svg", "aria-label")
        with pytest.raises(InvalidArgument):
            client.encode(np.full((1, 4), np.nan, np.float32))
    console.until(lambda: "INVALID_ARGUMENT" in console.text("#failures"))

    victim = children(daemon.process.pid)[0]
    os.kill(victim, signal.SIGKILL)
    console.until(lambda: "Worker started again" in console.text("#failures"))
    console.until(lambda: console.text("#state") == "Serving")
    daemon.stop(signal.SIGTERM)
    console.until(lambda: console.text("#state") == "No answer")
    assert [line for line in console.complaints if "ERR_CONNECTION" not in line] == []
