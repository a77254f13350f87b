"""Goldens, an oracle in float64, and small modules of every kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support import brute_force
from vqserve_server.quantizers import (
    AbstractQuantizer,
    EMAVectorQuantizer,
    GumbelQuantizer,
    VectorQuantizer,
    VectorQuantizerWithInputProjection,
)

KINDS = ("vq", "ema", "gumbel", "vq_projection")
K, D, C, OUT = 16, 4, 6, 5
_GOLDEN = Path(__file__).parents[2] / "golden"


@dataclass
class Golden:
    """One file of tests/golden."""

    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): self[name] for name in self.arrays if name.startswith(prefix)}


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    def load(name: str) -> Golden:
        with np.load(_GOLDEN / f"{name}.npz", allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        meta = json.loads(bytes(arrays.pop("meta")).decode()) if "meta" in arrays else {}
        return Golden(meta, arrays)

    return load


@pytest.fixture(scope="session")
def assert_close() -> Callable[[Tensor, Tensor], None]:
    """The goldens' measure: max|a - b| <= 1e-5 * max|b| over the whole array."""

    def check(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
        assert tuple(got.shape) == tuple(expected.shape)
        error = (got.detach().double() - expected.double()).abs().max()
        assert error <= tolerance * expected.double().abs().max()

    return check


@pytest.fixture(scope="session")
def nearest() -> Callable[[Tensor, Tensor], Tensor]:
    """argmin_j |z - a_j|^2 in float64, lowest index among equals."""

    def search(rows: Tensor, codes: Tensor) -> Tensor:
        return torch.from_numpy(brute_force.nearest(rows.detach().double().numpy(), codes.detach().double().numpy()))

    return search


@pytest.fixture(scope="session")
def make() -> Callable[..., AbstractQuantizer]:
    """make(kind, **arguments): a small module, the same for the same arguments."""

    def build(kind: str, num_codes: int = K, code_dim: int = D, seed: int = 0, **arguments: Any) -> AbstractQuantizer:
        torch.manual_seed(seed)
        module: AbstractQuantizer
        if kind == "vq":
            module = VectorQuantizer(num_codes, code_dim, **arguments)
        elif kind == "ema":
            module = EMAVectorQuantizer(num_codes, code_dim, **{"beta": 0.25, **arguments})
        elif kind == "gumbel":
            module = GumbelQuantizer(C, code_dim, num_codes, **arguments)
        else:
            module = VectorQuantizerWithInputProjection(C, num_codes, code_dim, **{"output_dim": OUT, **arguments})
        if kind in {"vq", "vq_projection"} and not arguments.get("embedding_weight_norm"):
            # Codes of the latents' size: those of the constructor all lie at the origin.
            torch.nn.init.normal_(module.embedding.weight)
        return module

    return build


@pytest.fixture(scope="session")
def latents() -> Callable[..., Tensor]:
    """latents(module, rank): normal latents of 2 to 5 axes, channels where the rank has them."""

    def draw(module: AbstractQuantizer, rank: int = 4, seed: int = 1) -> Tensor:
        channels = module.input_dim
        shape = {2: (7, channels), 3: (2, 5, channels), 4: (2, channels, 3, 4), 5: (2, channels, 2, 3, 2)}[rank]
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param
