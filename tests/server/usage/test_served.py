"""Codebook health of real servers: from a trained file, over traffic, to what a monitoring system reads."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.certificates import free_port
from support.waiting import eventually, read_until
from vqserve_client import Client

NUM_CODES, DIM = 64, 4
CENTRES = np.random.default_rng(0).standard_normal((40, DIM)).astype(np.float32)
# Alerts should fire above this.
ALARM_BITS = 0.05


def draw(rows: int, seed: int, *, centres: slice = slice(None)) -> np.ndarray[Any, Any]:
    """Latents around some of the centres."""
    rng = np.random.default_rng(seed)
    chosen = CENTRES[centres]
    noise = rng.standard_normal((rows, DIM)).astype(np.float32)
    return chosen[rng.integers(0, len(chosen), rows)] + 0.2 * noise


class Watched:
    """A daemon, and what its metrics port shows."""

    def __init__(self, daemon: Any, port: int) -> None:
        self.daemon = daemon
        self._port = port
        self._seeds = itertools.count(100)
        self.target = daemon.target

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=60) as response:
            return response.read().decode()

    def metrics(self) -> dict[str, float]:
        """The samples of codebook health, by name and labels."""
        found = {}
        for family in text_string_to_metric_families(self._get("/metrics")):
            for sample in family.samples:
                if sample.name.startswith("vqserve_codebook_") and sample.labels.get("codebook") == "book":
                    stage = sample.labels.get("stage")
                    found[sample.name + (f":{stage}" if stage else "")] = sample.value
        return found

    def json(self) -> dict[str, Any]:
        [codebook] = json.loads(self._get("/codebooks.json"))
        return codebook

    def sampled(self) -> float:
        return self.metrics().get("vqserve_codebook_sampled_rows_total", 0.0)

    def send(self, *, until: float, centres: slice = slice(None)) -> None:
        """Send new latents again and again, over new connections, until so many rows were sampled."""

        def sent() -> bool:
            for _ in range(5):
                with Client(self.target) as client:
                    client.encode(draw(5000, next(self._seeds), centres=centres))
            return self.sampled() >= until

        eventually(sent)


@pytest.fixture
def watch(vqserved: Callable[..., Any]) -> Callable[..., Watched]:
    def start(*arguments: object) -> Watched:
        port = free_port()
        return Watched(vqserved(*arguments, "--device", "cpu", "--metrics-port", port), port)

    return start


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A codebook that was trained, with its statistics."""
    from vqserve_tools.cli import main  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("trained")
    np.save(folder / "latents.npy", draw(20_000, 1))
    asked = ["train", folder / "latents.npy", "-o", folder / "book.safetensors", f"--num-codes={NUM_CODES}"]
    assert main([*map(str, asked), "--steps=30", "--quiet", "--device=cpu"]) == 0
    return folder / "book.safetensors"


@pytest.fixture
def own_book(book: Path, tmp_path: Path) -> Path:
    path = tmp_path / "book.safetensors"
    path.write_bytes(book.read_bytes())
    return path


@pytest.mark.parametrize("workers", [1, 2])
def test_the_drift_alarm_fires_on_other_latents_only(watch: Callable[..., Watched], book: Path, workers: int) -> None:
    watched = watch(book, "--workers", workers, "--sample-one-in", "4")
    assert watched.json()["stages"][0]["sampled_rows"] == 0
    watched.send(until=8000)
    usual = watched.metrics()
    assert usual["vqserve_codebook_drift_bits:0"] < ALARM_BITS / 5
    assert usual["vqserve_codebook_error_ratio"] == pytest.approx(1.0, abs=0.1)
    assert usual["vqserve_codebook_used_ratio:0"] > 0.9
    # The first quarter of the centres only, so a part of the codes.
    watched.send(centres=slice(10), until=2.2 * usual["vqserve_codebook_sampled_rows_total"])
    other = watched.metrics()
    assert other["vqserve_codebook_drift_bits:0"] > ALARM_BITS
    assert other["vqserve_codebook_perplexity:0"] < usual["vqserve_codebook_perplexity:0"]

    shown = watched.json()
    [stage] = shown["stages"]
    assert shown.keys() == {"name", "digest", "kind", "sampled_rows", "stages", "error", "error_ratio"}
    assert (shown["name"], shown["kind"], stage["codes"]) == ("book", "ema", NUM_CODES)
    assert re.fullmatch(r"[0-9a-f]{64}", shown["digest"])
    assert stage["used"] + stage["dead"] == NUM_CODES
    for shares in (stage["usage"], stage["reference"]):
        assert len(shares) == NUM_CODES
        assert sum(shares) == pytest.approx(1.0, abs=1e-3)


def test_a_worker_that_was_killed_goes_on_counting(watch: Callable[..., Watched], book: Path) -> None:
    watched = watch(book, "--workers", "2", "--sample-one-in", "1")
    watched.send(until=20_000)
    before = watched.sampled()
    window = watched.json()["stages"][0]["sampled_rows"]
    for pid in _ready_pids(watched):
        os.kill(pid, signal.SIGKILL)
    assert watched.sampled() >= before
    assert watched.json()["stages"][0]["sampled_rows"] >= window
    assert len(_ready_pids(watched)) == 2
    watched.send(until=before + 5000)


def _ready_pids(watched: Watched) -> list[int]:
    """Read the log until both workers are ready; return their process ids."""
    lines = [read_until(watched.daemon.process.stderr, " worker_ready ") for _ in range(2)]
    return [int(line.partition("pid=")[2].split()[0]) for line in lines]


def test_another_codebook_of_the_name_starts_anew(
    watch: Callable[..., Watched], own_book: Path, put: Callable[..., Any]
) -> None:
    watched = watch(own_book, "--sample-one-in", "1")
    watched.send(until=5000)
    before, total = watched.json(), watched.sampled()
    new = put(own_book, num_codes=NUM_CODES)
    watched.daemon.rescan()

    def is_new() -> bool:
        return watched.json()["digest"] == new.digest

    eventually(is_new)
    after = watched.json()
    assert before["digest"] != new.digest
    assert (after["error"], after["error_ratio"], after["stages"][0]["reference"]) == (None, None, None)
    assert after["stages"][0]["sampled_rows"] == 0
    assert watched.sampled() >= total
    watched.send(until=total + 3000)
    # The figures are made now and then.
    assert eventually(lambda: watched.json()["error"]) > 0


def test_statistics_of_a_served_file_count_after_a_reload(
    watch: Callable[..., Watched], own_book: Path, put: Callable[..., Any], tmp_path: Path, run_vqserved: Any
) -> None:
    served = put(own_book, num_codes=NUM_CODES)
    watched = watch(own_book, "--sample-one-in", "1")
    watched.send(until=5000)
    assert watched.json()["stages"][0]["reference"] is None
    assert "vqserve_codebook_drift_bits:0" not in watched.metrics()
    np.save(tmp_path / "z.npy", draw(20_000, 5))
    done = run_vqserved("inspect", own_book, "--latents", tmp_path / "z.npy", "--save-stats")
    assert done.returncode == 0, done.stderr
    watched.daemon.rescan()

    def is_compared() -> bool:
        return watched.json()["stages"][0]["reference"] is not None

    eventually(is_compared)
    shown = watched.json()
    assert shown["digest"] == served.digest
    assert shown["stages"][0]["sampled_rows"] >= 5000
    assert shown["error_ratio"] == pytest.approx(1.0, abs=0.1)
    assert shown["stages"][0]["drift_bits"] < ALARM_BITS / 5


def test_sampling_can_be_turned_off(watch: Callable[..., Watched], book: Path) -> None:
    watched = watch(book, "--sample-one-in", "0")
    with Client(watched.target) as client:
        client.encode(draw(5000, 2))
    assert watched.metrics().keys() <= {"vqserve_codebook_info"}
    assert json.loads(watched._get("/codebooks.json")) == []
