"""The rows whose indices a device must find again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kinds import CASES, make
from vqserve.errors import TokenBeyondRange
from vqserve_server.engine import Engine
from vqserve_server.engine.canary import Canary
from vqserve_server.quantizers import VectorQuantizer, VectorQuantizerWithInputProjection
from vqserve_server.tokenizer import Tokenizer

# All but two of their codes have the same index.
REMAPPED = {"projection_all", "dot_all"}


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_codebook_has_one(name: str) -> None:
    tokenizer = Tokenizer(make(name), device="cpu")
    assert tokenizer.probe is None
    tokenizer.check_itself()
    probe = tokenizer.probe
    assert probe is not None
    assert probe.seconds > 0
    # Not all rows are near one code.
    assert len(np.unique(probe.indices, axis=0)) > 1 or name in REMAPPED
    engine = Engine([tokenizer])
    engine.start()
    for _ in range(2):
        canary = Canary(tokenizer, probe)
        engine.scheduler.put(canary.job)
    assert engine.stop()
    assert canary.is_done
    assert (canary.has_failed, canary.wrong_rows) == (False, 0)


def test_large_numbers_are_no_probe() -> None:
    quantizer = VectorQuantizer(12, 3).double()
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.randn(12, 3) * 1e37)
    tokenizer = Tokenizer(quantizer, device="cpu")
    tokenizer.check_itself()
    assert tokenizer.probe is not None
    assert np.abs(tokenizer.probe.rows).max() <= 1000


def test_a_projection_that_overflows_has_none() -> None:
    quantizer = VectorQuantizerWithInputProjection(5, 12, 3)
    tokenizer = Tokenizer(quantizer, device="cpu")

    def encode_rows(rows: np.ndarray, **options: object) -> np.ndarray:
        # Ones are what a codebook is tested with when it is loaded.
        if (rows != 1).any():
            raise TokenBeyondRange("a projection overflows")
        return plain(rows, **options)

    plain, tokenizer.encode_rows = tokenizer.encode_rows, encode_rows
    tokenizer.check_itself()
    assert tokenizer.probe is None
