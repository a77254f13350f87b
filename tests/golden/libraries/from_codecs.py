"""The audio codecs' own packages EnCodec, DAC and Mimi; only the modules of their quantizers are imported."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from libraries.draw import Draw, by_parts
from libraries.golden import Golden
from libraries.library import fill, golden, module_alone, named


def encodec(draw: Draw) -> Golden:
    """Make EnCodec's residual quantizer (encodec)."""
    return _encodec(draw, "encodec", stages=draw.size(4, 32), width=draw.size(16, 128), suffix=".th")


def speechtokenizer(draw: Draw) -> Golden:
    """Make SpeechTokenizer's: EnCodec's with wider codes (speechtokenizer)."""
    return _encodec(draw, "speechtokenizer", stages=draw.size(3, 8), width=draw.size(24, 1024), suffix=".pt")


def dac(draw: Draw) -> Golden:
    """Make DAC's: every stage between weight-normalised projections, searched by cosine (descript-audio-codec)."""
    stages, codes, width, hidden = draw.size(4, 9), draw.size(64, 1024), 8, draw.size(32, 1024)
    module = module_alone("dac.nn.quantize").ResidualVectorQuantize(
        input_dim=hidden, n_codebooks=stages, codebook_size=codes, codebook_dim=width
    )
    values = {f"quantizers.{stage}.codebook.weight": draw.codes(codes, width) for stage in range(stages)}
    fill(module, draw, **values)
    latents = draw.sequences(draw.normal(draw.rows, hidden)).movedim(-1, 1).contiguous()
    indices = by_parts(lambda part: module(part)[1], latents)
    decoded = by_parts(lambda part: module.from_codes(part)[0], indices)
    return golden(
        "descript-audio-codec",
        named(module, "quantizer."),
        latents,
        indices,
        decoded,
        suffix=".pth",
        wrapper="state_dict",
        beside={"metadata": {"kwargs": {"n_codebooks": stages}}},
    )


def mimi(draw: Draw) -> Golden:
    """Make Mimi's: the first stage beside the rest, codes as quotients of moving sums (moshi)."""
    stages, codes, width, hidden = draw.size(4, 32), draw.size(64, 2048), draw.size(16, 256), draw.size(24, 512)
    module = module_alone("moshi.quantization.vq").SplitResidualVectorQuantizer(
        dimension=width, input_dimension=hidden, output_dimension=hidden, n_q=stages, n_q_semantic=1, bins=codes
    )
    values = {}
    for part, count in (("first", 1), ("rest", stages - 1)):
        for stage in range(count):
            usage = draw.positive(codes) ** 2
            # Codes that nothing reached for long: their usage is below the least that is divided by.
            usage[5] = 1e-6
            where = f"rvq_{part}.vq.layers.{stage}._codebook"
            values[f"{where}.embedding_sum"] = draw.codes(codes, width, 0.7**stage) * usage[:, None]
            values[f"{where}.cluster_usage"] = usage
            values[f"{where}._initialized"] = torch.ones(1)
    fill(module, draw, **values)
    latents = draw.sequences(1.5 * draw.normal(draw.rows, hidden)).movedim(-1, 1).contiguous()
    indices = by_parts(module.encode, latents)
    decoded = by_parts(module.decode, indices)
    return golden("moshi", named(module, "quantizer."), latents, indices, decoded, suffix=".safetensors")


def _encodec(draw: Draw, package: str, *, stages: int, width: int, suffix: str) -> Golden:
    codes = draw.size(64, 1024)
    module: nn.Module = module_alone(f"{package}.quantization.vq").ResidualVectorQuantizer(
        dimension=width, n_q=stages, bins=codes
    )
    codebooks = [draw.codes(codes, width, 0.7**stage) for stage in range(stages)]
    values: dict[str, Tensor] = {}
    for stage, codebook in enumerate(codebooks):
        usage = draw.positive(codes)
        where = f"vq.layers.{stage}._codebook"
        values[f"{where}.embed"] = codebook
        values[f"{where}.cluster_size"] = usage
        values[f"{where}.embed_avg"] = codebook * usage[:, None]
        values[f"{where}.inited"] = torch.ones(1)
    fill(module, draw, **values)
    latents = draw.sequences(draw.near(codebooks)).movedim(-1, 1).contiguous()
    indices = by_parts(lambda part: module.vq.encode(part).movedim(0, 1), latents)
    decoded = by_parts(lambda part: module.decode(part.movedim(1, 0)), indices)
    return golden(package, named(module, "quantizer."), latents, indices, decoded, suffix=suffix)
