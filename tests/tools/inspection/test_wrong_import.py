"""Warnings about codebooks that were probably imported wrongly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from vqserve_server.quantizers import CosineQuantizer, EMAVectorQuantizer, Quantizer, ResidualQuantizer, VectorQuantizer
from vqserve_tools.inspection import inspect
from vqserve_tools.latents.array import ArrayRows


def trained(quantizer: Quantizer, shrinking: float = 0.6) -> Quantizer:
    """Give codes as a trained codebook has them: each stage smaller than the one before."""
    generator = torch.Generator().manual_seed(0)
    for place, book in enumerate(quantizer.codebooks()):
        book.embedding.weight.data.normal_(generator=generator).mul_(shrinking**place)
    return quantizer


def stage(quantizer: Quantizer, number: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Quantizer:
    weight = quantizer.codebooks()[number - 1].embedding.weight
    weight.data.copy_(change(weight.data))
    return quantizer


def with_length_one(quantizer: Quantizer) -> Quantizer:
    return stage(quantizer, 1, lambda rows: torch.nn.functional.normalize(rows, dim=1))


def shared(quantizer: ResidualQuantizer) -> Quantizer:
    return stage(quantizer, 3, lambda rows: quantizer.codebooks()[1].embedding.weight.data)


def used(quantizer: EMAVectorQuantizer) -> Quantizer:
    quantizer.embedding.cluster_size.data.fill_(3.0)
    return quantizer


def drawn(rows: torch.Tensor) -> torch.Tensor:
    """As the constructor draws them, but always the same: the sign is statistical."""
    return rows.uniform_(-1 / len(rows), 1 / len(rows), generator=torch.Generator().manual_seed(0))


SIGNS = {
    "drawn by the constructor": (stage(VectorQuantizer(40, 3), 1, drawn), "the codebook looks untrained"),
    "an average that no token met": (trained(EMAVectorQuantizer(40, 3, 0.25)), "the codebook looks untrained"),
    "one stage drawn": (
        stage(trained(ResidualQuantizer(3, 40, 3)), 2, drawn),
        "stage 2 looks untrained",
    ),
    "length one": (with_length_one(trained(VectorQuantizer(40, 3))), "import it with --metric cosine"),
    "columns": (trained(VectorQuantizer(8, 40)), "if the model has 40 codes of width 8, import it with --transpose"),
    "a shared codebook": (shared(trained(ResidualQuantizer(4, 40, 3))), "stages 2 and 3 have equal codes"),
    "equal codes": (
        stage(trained(ResidualQuantizer(3, 40, 3)), 3, lambda rows: rows[:1].expand_as(rows)),
        "stage 3 is collapsed: 39 of its 40 codes equal an earlier code",
    ),
    "codes that are close together": (
        stage(trained(ResidualQuantizer(3, 40, 3)), 2, lambda rows: rows * 1e-7),
        "stage 2 is collapsed: its codes are",
    ),
}


@pytest.mark.parametrize("name", SIGNS)
def test_sign(saved, name):
    quantizer, text = SIGNS[name]
    [warning] = inspect(saved(quantizer)).report.warnings
    assert text in warning


@pytest.mark.parametrize(
    "quantizer",
    [
        trained(VectorQuantizer(40, 3)),
        used(trained(EMAVectorQuantizer(40, 3, 0.25))),
        with_length_one(trained(CosineQuantizer(40, 3))),
        trained(CosineQuantizer(40, 3)),
        trained(ResidualQuantizer(12, 40, 3)),
        trained(ResidualQuantizer(4, 40, 2, 5, "cosine", stage_projections=True)),
    ],
)
def test_a_trained_codebook_has_no_sign(saved, quantizer):
    assert inspect(saved(quantizer)).report.warnings == ()


def test_latents_that_the_codes_are_not_made_for(saved):
    quantizer = trained(VectorQuantizer(40, 3))
    rows = np.random.default_rng(0).standard_normal((500, 3)).astype(np.float32)
    codebook = saved(quantizer)
    assert inspect(codebook, ArrayRows(rows)).report.warnings == ()
    [warning] = inspect(codebook, ArrayRows(rows / 100)).report.warnings
    assert "the error is greater than the variance of the latents" in warning
