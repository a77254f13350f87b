"""vector-quantize-pytorch: one codebook, residual ones, grids and signs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from vector_quantize_pytorch import FSQ, LFQ, GroupedResidualVQ, ResidualVQ, SimVQ, VectorQuantize

from libraries.draw import Draw, by_parts
from libraries.golden import Golden
from libraries.library import fill, golden, named

_LIBRARY = "vector-quantize-pytorch"
_L2 = ("--metric", "l2")
_COSINE = ("--metric", "cosine")


def lucidrains_vq(draw: Draw) -> Golden:
    """Make VectorQuantize behind projections, searched by distance."""
    codes, width, hidden = draw.size(128, 4096), draw.size(8, 32), draw.size(24, 256)
    module = VectorQuantize(dim=hidden, codebook_dim=width, codebook_size=codes)
    fill(module, draw, **_codebook("", draw.codes(codes, width), draw))
    return _sequences(draw, module, draw.normal(draw.rows, hidden), flags=_L2)


def lucidrains_vq_cosine(draw: Draw) -> Golden:
    """Make VectorQuantize searched by cosine, with the very keys of the other."""
    codes, width = draw.size(128, 4096), draw.size(16, 64)
    module = VectorQuantize(dim=width, codebook_size=codes, use_cosine_sim=True)
    codebook = functional.normalize(draw.codes(codes, width), dim=1)
    fill(module, draw, **_codebook("", codebook, draw))
    return _sequences(draw, module, 3 * draw.near([codebook]), flags=_COSINE)


def lucidrains_rvq(draw: Draw) -> Golden:
    """Make ResidualVQ, behind projections."""
    stages, codes, width, hidden = draw.size(4, 8), draw.size(64, 1024), draw.size(12, 128), draw.size(24, 512)
    module = ResidualVQ(dim=hidden, codebook_dim=width, num_quantizers=stages, codebook_size=codes)
    codebooks = [draw.codes(codes, width, 0.7**stage) for stage in range(stages)]
    fill(module, draw, **_layers("", codebooks, draw))
    return _sequences(draw, module, 1.5 * draw.normal(draw.rows, hidden), flags=(*_L2, "--layout", "channels_last"))


def lucidrains_rvq_shared(draw: Draw) -> Golden:
    """Make ResidualVQ whose stages share a codebook, which its state dict holds once for each."""
    stages, codes, width = draw.size(4, 8), draw.size(96, 1024), draw.size(12, 128)
    module = ResidualVQ(dim=width, num_quantizers=stages, codebook_size=codes, shared_codebook=True)
    codebook = draw.codes(codes, width)
    shared = _codebook("layers.0.", codebook, draw)
    copies = {name.replace("layers.0.", f"layers.{stage}."): shared[name] for stage in range(stages) for name in shared}
    fill(module, draw, **copies)
    latents = draw.near([codebook] * 2)
    return _sequences(draw, module, latents, flags=(*_L2, "--layout", "channels_last"))


def lucidrains_rvq_cosine(draw: Draw) -> Golden:
    """Make ResidualVQ searched by cosine."""
    stages, codes, width = draw.size(4, 8), draw.size(64, 1024), draw.size(12, 128)
    module = ResidualVQ(dim=width, num_quantizers=stages, codebook_size=codes, use_cosine_sim=True)
    codebooks = [functional.normalize(draw.codes(codes, width), dim=1) for _ in range(stages)]
    fill(module, draw, **_layers("", codebooks, draw))
    return _sequences(draw, module, draw.near(codebooks), flags=(*_COSINE, "--layout", "channels_last"))


def lucidrains_grouped_rvq(draw: Draw) -> Golden:
    """Make GroupedResidualVQ: halves of the channels, each with stages of its own."""
    groups, stages, codes, width = 2, draw.size(3, 4), draw.size(64, 1024), draw.size(8, 128)
    module = GroupedResidualVQ(dim=groups * width, groups=groups, num_quantizers=stages, codebook_size=codes)
    codebooks = [[draw.codes(codes, width, 0.7**stage) for stage in range(stages)] for _ in range(groups)]
    values: dict[str, Tensor] = {}
    for group, of_group in enumerate(codebooks):
        values |= _layers(f"rvqs.{group}.", of_group, draw)
    fill(module, draw, **values)
    latents = draw.sequences(torch.cat([draw.near(of_group) for of_group in codebooks], dim=1))
    # Theirs are (g, b, n, q); ours are those of all groups' first stages, then of all second ones.
    indices = by_parts(lambda part: module(part)[1].permute(1, 2, 3, 0).flatten(2), latents)
    theirs = indices.unflatten(2, (stages, groups)).permute(3, 0, 1, 2)
    decoded = module.get_output_from_indices(theirs)
    flags = (*_L2, "--layout", "channels_last")
    return golden(_LIBRARY, named(module), latents, indices, decoded, suffix=".pt", flags=flags)


def lucidrains_fsq(draw: Draw) -> Golden:
    """Make FSQ behind projections: even and odd levels."""
    return _fsq(draw, preserve_symmetry=False, bound="atanh")


def lucidrains_fsq_symmetric(draw: Draw) -> Golden:
    """Make FSQ with the symmetric bound."""
    return _fsq(draw, preserve_symmetry=True, bound="symmetric")


def lucidrains_lfq(draw: Draw) -> Golden:
    """Make LFQ behind projections: the first channel is the most significant bit, as the mask in the file says."""
    bits, hidden = draw.size(9, 18), draw.size(16, 128)
    module = LFQ(codebook_size=2**bits, dim=hidden)
    fill(module, draw)
    latents = draw.sequences(draw.normal(draw.rows, hidden))
    indices = by_parts(lambda part: module(part)[1], latents)
    decoded = module.indices_to_codes(indices)
    return golden(_LIBRARY, named(module), latents, indices, decoded, suffix=".pt")


def lucidrains_simvq(draw: Draw) -> Golden:
    """Make SimVQ: the codes are a linear map of a frozen codebook."""
    codes, width = draw.size(128, 16384), draw.size(12, 64)
    module = SimVQ(dim=width, codebook_size=codes)
    fill(module, draw, frozen_codebook=draw.codes(codes, width))
    latents = draw.sequences(draw.near([module.codebook]))
    indices = by_parts(lambda part: module(part)[1], latents)
    decoded = module.indices_to_codes(indices)
    return golden(_LIBRARY, named(module), latents, indices, decoded, suffix=".pt")


def _fsq(draw: Draw, *, preserve_symmetry: bool, bound: str) -> Golden:
    levels, hidden = draw.size([8, 5, 4, 3], [8, 8, 8, 5, 5, 5]), draw.size(12, 64)
    module = FSQ(levels, dim=hidden, preserve_symmetry=preserve_symmetry)
    fill(module, draw)
    latents = draw.sequences(draw.normal(draw.rows, hidden))
    indices = by_parts(lambda part: module(part)[1], latents)
    flags = ("--kind", "fsq", "--levels", ",".join(map(str, levels)), "--bound", bound)
    decoded = module.indices_to_codes(indices)
    return golden(_LIBRARY, named(module), latents, indices, decoded, suffix=".pt", flags=flags)


def _sequences(draw: Draw, module: nn.Module, rows: Tensor, *, flags: tuple[str, ...]) -> Golden:
    latents = draw.sequences(rows)
    indices = by_parts(lambda part: module(part)[1], latents)
    decoded = by_parts(module.get_output_from_indices, indices)
    return golden(_LIBRARY, named(module), latents, indices, decoded, suffix=".pt", flags=flags)


def _layers(prefix: str, codebooks: Sequence[Tensor], draw: Draw) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for stage, codebook in enumerate(codebooks):
        values |= _codebook(f"{prefix}layers.{stage}.", codebook, draw)
    return values


def _codebook(prefix: str, codebook: Tensor, draw: Draw) -> dict[str, Tensor]:
    usage = draw.positive(1, len(codebook))
    return {
        f"{prefix}_codebook.embed": codebook[None],
        f"{prefix}_codebook.embed_avg": codebook[None] * usage[..., None],
        f"{prefix}_codebook.cluster_size": usage,
    }
