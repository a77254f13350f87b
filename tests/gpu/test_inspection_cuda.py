"""What `vqserved inspect` measures on a GPU is what it measures on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vqserve_server.quantizers import (
    CosineQuantizer,
    FiniteScalarQuantizer,
    GumbelQuantizer,
    ResidualQuantizer,
    VectorQuantizer,
    VectorQuantizerWithInputProjection,
    freeze,
)
from vqserve_tools.inspection.fit import FitTally, measure_fit
from vqserve_tools.latents.array import ArrayRows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]

KINDS = {
    "vq": lambda: VectorQuantizer(512, 12),
    "vq_remap": lambda: VectorQuantizer(512, 12, remap=[3, 4, 5], unknown_index="extra"),
    "gumbel": lambda: GumbelQuantizer(12, 5, 512),
    "projection": lambda: VectorQuantizerWithInputProjection(12, 512, 4),
    "cosine": lambda: CosineQuantizer(512, 12),
    "rvq": lambda: ResidualQuantizer(5, 512, 12),
    "fsq": lambda: FiniteScalarQuantizer([8, 5, 4], input_dim=12),
}


@pytest.mark.parametrize("name", KINDS)
def test_figures_are_the_cpu_s(name):
    torch.manual_seed(0)
    quantizer = KINDS[name]()
    for parameter in quantizer.parameters():
        parameter.data.normal_()
    latents = np.random.default_rng(0).standard_normal((5000, 12)).astype(np.float32)
    latents[7] = 1e5
    rows = ArrayRows(latents)
    here, there = (measure_fit(FitTally(quantizer, freeze(quantizer, device=name)), rows) for name in ("cpu", "cuda"))
    assert there.device.startswith("cuda")
    assert (there.usage, there.rounded, there.outside_remap) == (here.usage, here.rounded, here.outside_remap)
    if here.error is None:
        assert there.error is None
    else:
        assert there.error.compared == here.error.compared
        assert there.error.mean_squared == pytest.approx(here.error.mean_squared, rel=1e-12)
        assert there.error.distance.p90 == pytest.approx(here.error.distance.p90, rel=2**-14)
