"""Fixtures of quantizers of every kind (tests/kinds.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kinds import TRAINED, make
from vqserve_server.quantizers import Quantizer


@pytest.fixture(params=TRAINED)
def trained_quantizer(request: pytest.FixtureRequest) -> Quantizer:
    """A quantizer of each of the four classes that are recognized by their state dicts."""
    return make(request.param)


@pytest.fixture
def make_quantizer() -> Callable[..., Quantizer]:
    return make
