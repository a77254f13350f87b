"""Tokenizers for tests of the engine and of the gRPC edge: small, quick, and stoppable; and faults for real servers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.brute_force import nearest
from support.faults import Faults
from vqserve.codebook_info import CodebookInfo


class FakeTokenizer:
    """Nearest code by brute force in float64; counts its calls, and can be made to wait or to fail."""

    def __init__(self, codes: np.ndarray, *, name: str = "fake", decodable: int | None = None) -> None:
        self.codes = codes
        self.decodable = len(codes) if decodable is None else decodable
        self.device = torch.device("cpu")
        self.search = "fake"
        self.probe = None
        self.native_batch = None
        self.info = CodebookInfo(
            name=name,
            digest=f"{len(codes):064x}",
            kind="vq",
            num_codes=len(codes),
            vocab_size=len(codes),
            input_dim=codes.shape[1],
            code_dim=codes.shape[1],
            output_dim=codes.shape[1],
        )
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.batches: list[np.ndarray] = []
        self.error: BaseException | None = None

    def encode_rows(self, rows: np.ndarray, *, num_quantizers: int | None = None) -> np.ndarray:
        self._enter(rows)
        return nearest(rows, self.codes)

    def decode_rows(self, indices: np.ndarray, *, output: str, dtype: np.dtype | None = None) -> np.ndarray:
        self._enter(indices)
        return self.codes[indices] if output == "latents" else -self.codes[indices]

    def _enter(self, batch: np.ndarray) -> None:
        self.batches.append(batch.copy())
        self.entered.release()
        self.gate.wait()
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def hold(self) -> None:
        """Let calls wait from now on."""
        self.gate.clear()

    def release(self) -> None:
        """Let them go on."""
        self.gate.set()

    def wait_entered(self) -> None:
        """Wait for the next call that was not waited for yet."""
        self.entered.acquire()


@pytest.fixture
def fake() -> Iterator[Callable[..., FakeTokenizer]]:
    """Make a fake: fake(num_codes=16, dim=4, name="fake"). What it holds is released at the end."""
    made: list[FakeTokenizer] = []

    def make(num_codes: int = 16, dim: int = 4, *, dtype: Any = np.float32, **options: Any) -> FakeTokenizer:
        codes = np.random.default_rng(num_codes).standard_normal((num_codes, dim)).astype(dtype)
        made.append(FakeTokenizer(codes, **options))
        return made[-1]

    yield make
    for tokenizer in made:
        tokenizer.release()


@pytest.fixture
def faults(tmp_path: Path) -> Faults:
    """Faults for a server whose environment has `faults.environ`."""
    folder = tmp_path / "faults"
    folder.mkdir()
    return Faults(folder)


@pytest.fixture
def tokenizer(tmp_path: Path, put: Callable[..., Any]) -> Any:
    """The tokenizer of a codebook that is in tmp_path / "book.safetensors"."""
    return put(tmp_path / "book.safetensors")
