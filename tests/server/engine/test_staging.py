"""The memory of a device thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vqserve_server.engine import DecodeKey, EncodeKey
from vqserve_server.engine.batch import Staging


def test_it_is_kept_and_grows(fake: Callable[..., Any]) -> None:
    key = EncodeKey(fake(dim=3), np.dtype(np.float32))
    staging = Staging()
    few = staging.rows(key, 5)
    assert few.shape == (5, 3)
    assert few.dtype == np.float32
    fewer = staging.rows(key, 2)
    assert np.shares_memory(few, fewer)
    many = staging.rows(key, 1000)
    many[:] = 1.0
    assert many.shape == (1000, 3)
    assert np.shares_memory(many, staging.rows(key, 5))


def test_it_is_the_same_for_all_keys(fake: Callable[..., Any]) -> None:
    tokenizer = fake(dim=3)
    staging = Staging()
    wide = staging.rows(EncodeKey(tokenizer, np.dtype(np.float64)), 8)
    for key, shape in (
        (EncodeKey(tokenizer, np.dtype(np.float32)), (7, 3)),
        (DecodeKey(tokenizer, "latents", np.dtype(np.float32)), (7,)),
        (DecodeKey(tokenizer, "latents", np.dtype(np.float32), 2), (7, 2)),
    ):
        rows = staging.rows(key, 7)
        assert rows.shape == shape
        assert rows.dtype == key.rows_dtype
        assert rows.flags.c_contiguous
        assert rows.flags.aligned
        assert np.shares_memory(rows, wide)
