"""Small quantizers of every kind and variant, the same in every run."""

from __future__ import annotations

from collections.abc import Callable

import torch

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


def laid_out(quantizer: Quantizer, layout: str | None) -> Quantizer:
    quantizer.layout = layout
    return quantizer


TRAINED: dict[str, Callable[[], Quantizer]] = {
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
CASES: dict[str, Callable[[], Quantizer]] = {
    **TRAINED,
    "vq_channels_first": lambda: laid_out(VectorQuantizer(12, 3), "channels_first"),
    "cosine": lambda: CosineQuantizer(12, 3),
    "cosine_all": lambda: CosineQuantizer(
        12, 3, decode_normalized=True, input_dim=5, output_dim=4, remap=[3, 8], unknown_index="extra"
    ),
    "dot": lambda: DotQuantizer(12, 3),
    "dot_all": lambda: DotQuantizer(12, 3, input_dim=5, output_dim=4, remap=[3, 8], unknown_index=9).double(),
    "rvq": lambda: ResidualQuantizer(4, 12, 3),
    "rvq_channels_last": lambda: laid_out(ResidualQuantizer(1, 12, 3), "channels_last"),
    "rvq_any_layout": lambda: laid_out(ResidualQuantizer(2, 12, 3).double(), None),
    "rvq_grouped": lambda: ResidualQuantizer(6, 12, 2, 8, groups=2, inner_dim=2),
    "rvq_dac": lambda: ResidualQuantizer(3, 12, 2, 5, "cosine", stage_projections=True),
    "rvq_mimi": lambda: ResidualQuantizer(4, 12, 2, 5, inner_dim=2, first_quantizers=1),
    "rvq_normalized": lambda: ResidualQuantizer(2, 12, 3, metric="cosine", decode_normalized=True),
    "rvq_dot": lambda: ResidualQuantizer(2, 12, 3, metric="dot"),
    "rvq_normalized_residuals": lambda: ResidualQuantizer(3, 12, 4, normalize_residuals=True),
    "rvq_sizes": lambda: ResidualQuantizer(3, [5, 12, 7], 3),
    # fish-speech's arrangement, in small: a semantic stage with more codes, then nine acoustic ones.
    "rvq_fish": lambda: ResidualQuantizer(10, [40] + [12] * 9, 2, 5, "cosine", stage_projections=True),
    # UniTok's: one stage for each group of channels.
    "rvq_unitok": lambda: ResidualQuantizer(4, [12, 5, 12, 7], 2, 8, "cosine", decode_normalized=True, groups=4),
    "fsq": lambda: FiniteScalarQuantizer([8, 5, 5]),
    "fsq_all": lambda: FiniteScalarQuantizer([3, 4], "tan", input_dim=5, output_dim=4).double(),
    "residual_fsq": lambda: ResidualFiniteScalarQuantizer([4, 3], 3, "atanh_twice", "levels_minus_one"),
    "residual_fsq_one": lambda: ResidualFiniteScalarQuantizer(
        [4, 4], 1, "atanh", "levels_minus_one", input_dim=5, output_dim=4
    ),
    "residual_fsq_grouped": lambda: ResidualFiniteScalarQuantizer(
        [4, 3], 6, "soft_clamp", "levels", groups=2, input_dim=6, output_dim=8
    ).double(),
    "lfq": lambda: LookupFreeQuantizer(7, "big"),
    "lfq_all": lambda: LookupFreeQuantizer(4, "little", spherical=True, input_dim=5, output_dim=4),
}
# The first case of each kind, by kind.
ONE_OF_EACH: dict[str, str] = {}
for _name, _new in CASES.items():
    ONE_OF_EACH.setdefault(_new().kind, _name)


def with_every_kind(cases: dict[str, Callable[[], Quantizer]]) -> dict[str, Callable[[], Quantizer]]:
    """Return a test's own cases, and the example of every kind that they leave out."""
    there = {new().kind for new in cases.values()}
    return {**cases, **{name: CASES[name] for kind, name in ONE_OF_EACH.items() if kind not in there}}


def make(name: str, seed: int = 0) -> Quantizer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CASES[name]().eval()


def bounds(quantizer: Quantizer) -> torch.Tensor:
    """Return the exclusive bound of each of a token's indices that decode takes, (n_q,), or (1,) if they share one."""
    return torch.tensor(quantizer.stage_vocab_sizes or [quantizer.decodable])
