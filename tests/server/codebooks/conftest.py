"""Fixtures of quantizers of every kind (tests/kinds.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kinds import CASES, make
from vqserve_server.quantizers import Quantizer


@pytest.fixture(params=CASES)
def quantizer(request: pytest.FixtureRequest) -> Quantizer:
    return make(request.param)


@pytest.fixture
def make_quantizer() -> Callable[..., Quantizer]:
    return make
