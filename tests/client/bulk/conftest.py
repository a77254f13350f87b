"""A data set of several files, a real server for it, and the command in this process or in one of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vqserve_client import Client
from vqserve_client.cli import main

DIM = 4


@pytest.fixture
def book(put, tmp_path):
    """The codebook of the server, in this process: 300 codes of 4 dimensions."""
    return put(tmp_path / "books" / "small.safetensors", num_codes=300, dim=DIM)


@pytest.fixture
def server(serving, book):
    return serving(book)


@pytest.fixture
def client(server):
    with Client(server.target) as made:
        yield made


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    """Latents by key, of different shapes and types."""
    generator = np.random.default_rng(0)

    def latents(*shape: int, dtype: str = "float32") -> np.ndarray:
        return generator.standard_normal(shape).astype(dtype)

    return {
        "a": latents(1, DIM, 8, 8),
        "b/c": latents(2, DIM, 4, 6),
        "b/d": latents(1, DIM, 8, 8, dtype="float16"),
        "e": latents(3, DIM, 2, 2, dtype="float64"),
        "f/x": latents(1, DIM, 3, 5),
        "f/y": latents(2, DIM, 3, 5),
        **{f"g/{number:02}": latents(1, DIM, 4, 4) for number in range(20)},
    }


@pytest.fixture
def source(tmp_path, arrays) -> Path:
    """A folder with these arrays: .npy files, and f.npz with two members."""
    folder = tmp_path / "latents"
    for key, array in arrays.items():
        if not key.startswith("f/"):
            path = folder / f"{key}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, array)
    np.savez(folder / "f.npz", x=arrays["f/x"], y=arrays["f/y"])
    return folder


@pytest.fixture
def vqserve(server, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: vqserve("encode", ...) -> (exit code, stdout, stderr)."""
    monkeypatch.setenv("VQSERVE_TARGET", server.target)
    monkeypatch.delenv("VQSERVE_CODEBOOK", raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def start(server) -> Any:
    """Start a command in a process of its own: start("encode", ...) -> Popen."""
    processes: list[subprocess.Popen[str]] = []

    def run(*arguments: object, target: str | None = None, **options: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "vqserve", *map(str, arguments), "--target", target or server.target],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()
