"""Small codebooks of every kind in files, and latents for them, the same in every run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kinds import with_every_kind
from vqserve_server.codebooks import Codebook, load_codebook, save_codebook
from vqserve_server.quantizers import (
    CosineQuantizer,
    DotQuantizer,
    EMAVectorQuantizer,
    FiniteScalarQuantizer,
    GumbelQuantizer,
    LookupFreeQuantizer,
    Quantizer,
    ResidualFiniteScalarQuantizer,
    ResidualQuantizer,
    VectorQuantizer,
    VectorQuantizerWithInputProjection,
)
from vqserve_tools.inspection import fit

K = 40
KINDS = with_every_kind(
    {
        "vq": lambda: VectorQuantizer(K, 3),
        "vq_remap": lambda: VectorQuantizer(K, 3, remap=[7, 2, 2, 0], unknown_index="extra"),
        "vq_sentinel": lambda: VectorQuantizer(K, 3, remap=[7, 2, 5], unknown_index=4_000_000_000),
        "vq_weight_norm": lambda: VectorQuantizer(K, 3, embedding_weight_norm=True),
        "vq_float64": lambda: VectorQuantizer(K, 3).double(),
        "ema": lambda: EMAVectorQuantizer(K, 3, 0.25),
        "gumbel": lambda: GumbelQuantizer(5, 3, K),
        "gumbel_remap": lambda: GumbelQuantizer(5, 3, K, remap=[7, 2, 2, 30, 11], unknown_index="extra"),
        "projection": lambda: VectorQuantizerWithInputProjection(5, K, 3),
        "projection_out": lambda: VectorQuantizerWithInputProjection(5, K, 3, output_dim=4),
        "projection_back": lambda: VectorQuantizerWithInputProjection(5, K, 3, output_dim=5),
        "cosine": lambda: CosineQuantizer(K, 3),
        "cosine_normalized": lambda: CosineQuantizer(K, 3, decode_normalized=True, input_dim=5, remap=[1, 2]),
        "cosine_back": lambda: CosineQuantizer(K, 3, input_dim=5, output_dim=5),
        "dot": lambda: DotQuantizer(K, 3),
        "dot_out": lambda: DotQuantizer(K, 3, output_dim=4),
        "rvq": lambda: ResidualQuantizer(5, K, 3),
        "rvq_one": lambda: ResidualQuantizer(1, K, 3),
        "rvq_grouped": lambda: ResidualQuantizer(6, K, 2, 8, groups=2, inner_dim=2),
        "rvq_dac": lambda: ResidualQuantizer(3, K, 2, 5, "cosine", stage_projections=True),
        "rvq_mimi": lambda: ResidualQuantizer(4, K, 2, 5, inner_dim=2, first_quantizers=1),
        "fsq": lambda: FiniteScalarQuantizer([8, 5, 3, 2]),
        "fsq_tan": lambda: FiniteScalarQuantizer([8, 5, 3], "tan", input_dim=5),
        "fsq_symmetric": lambda: FiniteScalarQuantizer([7, 4], "symmetric"),
        "fsq_back": lambda: FiniteScalarQuantizer([8, 5, 3], input_dim=5, output_dim=5),
        "residual_fsq": lambda: ResidualFiniteScalarQuantizer([8, 5, 3], 4, "atanh_twice", "levels_minus_one"),
        "residual_fsq_atanh": lambda: ResidualFiniteScalarQuantizer(
            [8, 5], 2, "atanh", "levels_minus_one", input_dim=5
        ),
        "residual_fsq_symmetric": lambda: ResidualFiniteScalarQuantizer([6, 5], 3, "symmetric", "levels"),
        "residual_fsq_back": lambda: ResidualFiniteScalarQuantizer(
            [8, 5], 6, "soft_clamp", "levels", groups=2, input_dim=6, output_dim=6
        ),
        "lfq": lambda: LookupFreeQuantizer(6, "big"),
        "lfq_spherical": lambda: LookupFreeQuantizer(32, "little", spherical=True),
    }
)


def make(name: str, seed: int = 0) -> Quantizer:
    """Make one with codes as wide apart as latents are."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        quantizer = KINDS[name]().eval()
        for parameter in quantizer.parameters():
            parameter.normal_()
        return quantizer


@pytest.fixture
def make_quantizer() -> Callable[..., Quantizer]:
    return make


@pytest.fixture(params=KINDS)
def quantizer(request: pytest.FixtureRequest) -> Quantizer:
    return make(request.param)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Codebook]:
    """Return a quantizer's codebook as a file gives it back."""

    def save(quantizer: Quantizer, **provenance: Any) -> Codebook:
        path = tmp_path / "book.safetensors"
        save_codebook(quantizer, path, provenance=provenance)
        return load_codebook(path)

    return save


@pytest.fixture
def latents_of() -> Callable[..., np.ndarray]:
    """Return latents (n, C) for a quantizer."""

    def draw(quantizer: Quantizer, count: int = 500, dtype: Any = np.float32, seed: int = 1) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal((count, quantizer.input_dim)).astype(dtype)

    return draw


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let latents go through in pieces of 64 tokens."""
    monkeypatch.setattr(fit, "_MOST_ROWS_AT_ONCE", 64)
