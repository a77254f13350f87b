"""The memory that a large codebook takes: what docs/operations.md promises."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vqserve_client import Client
from vqserve_server.codebooks import load_codebook, save_codebook
from vqserve_server.quantizers import VectorQuantizer, freeze
from vqserve_server.search import Objective, prepare
from vqserve_server.search.native import codebook as native_codebook
from vqserve_server.tokenizer import Tokenizer


def resident(daemon: Any, key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+)", Path(f"/proc/{daemon.process.pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.long
def test_a_large_codebook_is_in_memory_little_more_than_twice(vqserved: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    quantizer = VectorQuantizer(400_000, 64)
    save_codebook(quantizer, path)
    size = path.stat().st_size
    empty = vqserved("--device", "cpu")
    base = resident(empty, "VmRSS")
    empty.stop(signal.SIGTERM)
    daemon = vqserved(path, "--device", "cpu")
    # Its rows, and the same again as the search reads them; 32 bytes for each code.
    assert resident(daemon, "VmRSS") - base < 2.6 * size
    assert resident(daemon, "VmHWM") - base < 3.2 * size
    with Client(daemon.target) as client:
        indices = client.encode(quantizer.embedding.weight[:1000].detach().numpy())
        np.testing.assert_array_equal(indices, np.arange(1000))
        client.decode(indices, dtype="float16")
    # A table in half precision.
    assert resident(daemon, "VmRSS") - base < 3.2 * size


@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize("dim", [4, 16, 70])
def test_a_codebook_that_keeps_its_order_gives_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch, objective: Objective, dim: int
) -> None:
    generator = torch.Generator().manual_seed(dim)
    codes = torch.randn(1000, dim, generator=generator)
    # Codes of very different lengths in one block, a duplicate, and rows between two codes.
    codes[::50] *= 100
    codes[7] = codes[3]
    rows = torch.cat([codes, (codes[1:] + codes[:-1]) / 2, torch.randn(500, dim, generator=generator)])
    bias = torch.randn(1000, generator=generator) if objective is Objective.DOT else None
    usual = prepare(codes, objective=objective, bias=bias).search(rows)
    monkeypatch.setattr(native_codebook, "_MAX_SORTED_BYTES", 0)
    assert torch.equal(prepare(codes, objective=objective, bias=bias).search(rows), usual)
    assert torch.equal(prepare(codes, objective=objective, bias=bias, backend="reference").search(rows), usual)


def test_rows_are_in_memory_once(tmp_path: Path) -> None:
    save_codebook(VectorQuantizer(16, 4), tmp_path / "book.safetensors")
    codebook = load_codebook(tmp_path / "book.safetensors")
    tokenizer = Tokenizer.of_codebook(codebook, name="book", device="cpu")
    served = tokenizer._open()
    weight = codebook.quantizer.embedding.weight
    assert served._table.rows.ctypes.data == served._codebook.codes.ctypes.data == weight.data_ptr()
    frozen = freeze(codebook.quantizer, device="cpu", shares_memory=True)
    assert frozen._code_rows.rows.data_ptr() == frozen._problem.codes.data_ptr() == weight.data_ptr()
    assert tokenizer.digest == Tokenizer(codebook.quantizer).digest


def test_a_quantizer_of_the_caller_is_not_shared() -> None:
    quantizer = VectorQuantizer(16, 4)
    tokenizer = Tokenizer(quantizer, device="cpu")
    latents = torch.randn(100, 4)
    before = tokenizer.encode(latents), tokenizer.decode(torch.arange(16))
    with torch.no_grad():
        quantizer.embedding.weight.zero_()
    assert torch.equal(tokenizer.encode(latents), before[0])
    assert torch.equal(tokenizer.decode(torch.arange(16)), before[1])
