"""Small quantizers of every kind and variant, the same in every run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vqserve_server.quantizers import (
    AbstractQuantizer,
    EMAVectorQuantizer,
    GumbelQuantizer,
    VectorQuantizer,
    VectorQuantizerWithInputProjection,
)

CASES: dict[str, Callable[[], AbstractQuantizer]] = {
    "vq": lambda: VectorQuantizer(12, 3, beta=0.5, sane_index_shape=True, log_perplexity=True, loss_key="loss/ü"),
    "vq_random": lambda: VectorQuantizer(12, 3, remap=[7, 2, 2, 0]),
    "vq_extra": lambda: VectorQuantizer(12, 3, remap=[7, 2, 5], unknown_index="extra"),
    "vq_sentinel": lambda: VectorQuantizer(12, 3, remap=[7, 2, 5], unknown_index=300),
    "vq_weight_norm": lambda: VectorQuantizer(12, 3, embedding_weight_norm=True),
    "vq_float64": lambda: VectorQuantizer(12, 3).double(),
    "ema": lambda: EMAVectorQuantizer(12, 3, 0.25, decay=0.9, eps=1e-4),
    "ema_extra": lambda: EMAVectorQuantizer(12, 3, 0.25, remap=[1, 2], unknown_index="extra"),
    "gumbel": lambda: GumbelQuantizer(5, 3, 12, straight_through=False, kl_weight=0.1, temp_init=0.7),
    "gumbel_extra": lambda: GumbelQuantizer(5, 3, 12, remap=[7, 2, 5], unknown_index="extra"),
    "gumbel_sentinel": lambda: GumbelQuantizer(5, 3, 12, remap=[7, 2, 5], unknown_index=9),
    "projection": lambda: VectorQuantizerWithInputProjection(5, 12, 3),
    "projection_out": lambda: VectorQuantizerWithInputProjection(5, 12, 3, output_dim=4),
    "projection_all": lambda: VectorQuantizerWithInputProjection(
        5, 12, 3, output_dim=4, remap=[3, 8], unknown_index="extra", embedding_weight_norm=True
    ),
}


def make(name: str, seed: int = 0) -> AbstractQuantizer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CASES[name]().eval()


@pytest.fixture(params=CASES)
def quantizer(request: pytest.FixtureRequest) -> AbstractQuantizer:
    return make(request.param)


@pytest.fixture
def make_quantizer() -> Callable[..., AbstractQuantizer]:
    return make
