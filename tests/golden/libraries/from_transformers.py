"""Hugging Face transformers: Chameleon and Emu3 for images; EnCodec, DAC, Mimi, XCodec and others for sound."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import torch
from torch import nn
from transformers import ChameleonVQVAEConfig, DacConfig, Emu3VQVAEConfig, EncodecConfig, MimiConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE
from transformers.models.dac.modeling_dac import DacResidualVectorQuantizer
from transformers.models.emu3.modeling_emu3 import Emu3VQVAE
from transformers.models.encodec.modeling_encodec import EncodecResidualVectorQuantizer
from transformers.models.mimi.modeling_mimi import MimiSplitResidualVectorQuantizer
from transformers.models.xcodec.modeling_xcodec import XcodecResidualVectorQuantization
from transformers.models.xcodec2.modeling_xcodec2 import Xcodec2Quantizer

from libraries.draw import Draw, by_parts
from libraries.golden import Golden
from libraries.library import fill, golden, named, pretend

_AROUND = ("quantize.", "quant_conv.", "post_quant_conv.", "encoder.conv_in.")


def chameleon(draw: Draw) -> Golden:
    """Make Chameleon's image tokenizer."""
    width, codes = draw.size(16, 256), draw.size(128, 8192)
    config = ChameleonVQVAEConfig(
        embed_dim=width,
        num_embeddings=codes,
        latent_channels=draw.size(8, 256),
        resolution=8,
        base_channels=32,
        channel_multiplier=[1],
        num_res_blocks=1,
        attn_type="none",
    )
    model = ChameleonVQVAE(config)
    codebook = draw.codes(codes, width)
    fill(model, draw, quantize__embedding__weight=codebook)
    latents = draw.images(draw.near([codebook]))
    indices = by_parts(lambda part: model.quantize(part)[2].reshape(len(part), 4, 4), latents)
    decoded = model.quantize.embedding(indices).movedim(-1, 1)
    return golden(
        "transformers",
        named(model, "model.vqmodel.", _AROUND),
        latents,
        indices,
        decoded,
        suffix=".safetensors",
        flags=("--prefix", "model.vqmodel.quantize.", "--metric", "l2"),
    )


def emu3(draw: Draw) -> Golden:
    """Make Emu3's vision tokenizer: frames of video, three-dimensional convolutions around the codes."""
    codes, width = draw.size(256, 32768), 4
    config = Emu3VQVAEConfig(
        codebook_size=codes,
        embed_dim=width,
        latent_channels=width,
        base_channels=32,
        channel_multiplier=[1],
        num_res_blocks=1,
        attn_resolutions=[],
        temporal_downsample_factor=2,
    )
    model = Emu3VQVAE(config)
    codebook = draw.codes(codes, width)
    fill(model, draw, quantize__embedding__weight=codebook)
    latents = draw.videos(draw.near([codebook]))
    # The library's own order is (b, t, C, h, w).
    indices = by_parts(lambda part: model.quantize(part.transpose(1, 2)).reshape(-1, 2, 4, 4), latents)
    decoded = model.quantize.embedding(indices).movedim(-1, 1)
    return golden(
        "transformers",
        named(model, only=_AROUND),
        latents,
        indices,
        decoded,
        suffix=".safetensors",
    )


def encodec_transformers(draw: Draw) -> Golden:
    """Make EnCodec's residual quantizer."""
    stages, codes, width = draw.size(4, 32), draw.size(64, 1024), draw.size(16, 128)
    config = EncodecConfig(
        target_bandwidths=[stages * draw.size(6, 10) * 75 / 1000], codebook_size=codes, codebook_dim=width
    )
    module = EncodecResidualVectorQuantizer(config)
    codebooks = [draw.codes(codes, width, 0.7**stage) for stage in range(stages)]
    values = {}
    for stage, codebook in enumerate(codebooks):
        usage = draw.positive(codes)
        values[f"layers.{stage}.codebook.embed"] = codebook
        values[f"layers.{stage}.codebook.cluster_size"] = usage
        values[f"layers.{stage}.codebook.embed_avg"] = codebook * usage[:, None]
        values[f"layers.{stage}.codebook.inited"] = torch.ones(1)
    fill(module, draw, **values)
    latents = draw.sequences(draw.near(codebooks)).movedim(-1, 1).contiguous()
    indices = by_parts(lambda part: module.encode(part).movedim(0, 1), latents)
    decoded = by_parts(lambda part: module.decode(part.movedim(1, 0)), indices)
    state = named(module, "quantizer.")
    return golden("transformers", state, latents, indices, decoded, suffix=".safetensors")


def dac_transformers(draw: Draw) -> Golden:
    """Make DAC's: every stage between projections, weight norm already taken off."""
    stages, codes, width, hidden = draw.size(4, 9), draw.size(64, 1024), 8, draw.size(32, 1024)
    config = DacConfig(n_codebooks=stages, codebook_size=codes, codebook_dim=width, hidden_size=hidden)
    module = DacResidualVectorQuantizer(config)
    values = {f"quantizers.{stage}.codebook.weight": draw.codes(codes, width) for stage in range(stages)}
    fill(module, draw, **values)
    latents = draw.sequences(draw.normal(draw.rows, hidden)).movedim(-1, 1).contiguous()
    indices = by_parts(lambda part: module(part)[1], latents)
    decoded = by_parts(lambda part: module.from_codes(part)[0], indices)
    state = named(module, "quantizer.")
    return golden("transformers", state, latents, indices, decoded, suffix=".safetensors")


def mimi_transformers(draw: Draw) -> Golden:
    """Make Mimi's: one semantic stage beside the acoustic ones, codes as quotients of moving sums."""
    stages, codes, width, hidden = draw.size(4, 32), draw.size(64, 2048), draw.size(16, 256), draw.size(24, 512)
    config = MimiConfig(
        num_quantizers=stages,
        num_semantic_quantizers=1,
        codebook_size=codes,
        codebook_dim=width,
        vector_quantization_hidden_dimension=width,
        hidden_size=hidden,
    )
    module = MimiSplitResidualVectorQuantizer(config)
    values = {}
    for part, count in (("semantic", 1), ("acoustic", stages - 1)):
        for stage in range(count):
            usage = draw.positive(codes) ** 2
            # Codes that nothing reached for long: their usage is below the least that is divided by.
            usage[5] = 1e-6
            where = f"{part}_residual_vector_quantizer.layers.{stage}.codebook"
            values[f"{where}.embed_sum"] = draw.codes(codes, width, 0.7**stage) * usage[:, None]
            values[f"{where}.cluster_usage"] = usage
            values[f"{where}.initialized"] = torch.ones(1)
    fill(module, draw, **values)
    latents = draw.sequences(1.5 * draw.normal(draw.rows, hidden)).movedim(-1, 1).contiguous()
    indices = by_parts(lambda part: module.encode(part).movedim(0, 1), latents)
    decoded = by_parts(module.decode, indices)
    state = named(module, "quantizer.")
    return golden("transformers", state, latents, indices, decoded, suffix=".safetensors")


def xcodec(draw: Draw) -> Golden:
    """Make XCodec's: EnCodec's stages, wider."""
    stages, codes, width = draw.size(4, 8), draw.size(64, 1024), draw.size(16, 1024)
    config = SimpleNamespace(num_quantizers=stages, frame_rate=50, codebook_size=codes, codebook_dim=width)
    module = XcodecResidualVectorQuantization(config)
    codebooks = [draw.codes(codes, width, 0.7**stage) for stage in range(stages)]
    return _of_buffers(draw, module, codebooks, draw.near(codebooks))


def higgs_audio_v2(draw: Draw) -> Golden:
    """Make Higgs Audio v2's: every stage between projections."""
    # The module imports it for what comes before the quantizer.
    pretend("torchaudio")
    library = importlib.import_module("transformers.models.higgs_audio_v2_tokenizer.modeling_higgs_audio_v2_tokenizer")
    stages, codes, width, hidden = draw.size(4, 8), draw.size(64, 1024), draw.size(8, 64), draw.size(24, 1024)
    config = SimpleNamespace(
        num_quantizers=stages, frame_rate=50, codebook_size=codes, codebook_dim=width, hidden_size=hidden
    )
    module = library.HiggsAudioV2TokenizerResidualVectorQuantization(config)
    codebooks = [draw.codes(codes, width, 0.7**stage) for stage in range(stages)]
    return _of_buffers(draw, module, codebooks, 1.5 * draw.normal(draw.rows, hidden))


def xcodec_2(draw: Draw) -> Golden:
    """Make X-Codec 2's: one stage of residual FSQ as vector-quantize-pytorch 1.17.8 has it, bounded twice."""
    levels, width = [4] * 8, draw.size(24, 2048)
    module = Xcodec2Quantizer(SimpleNamespace(quantization_dim=width, quantization_levels=levels))
    fill(module, draw)
    latents = draw.sequences(2 * draw.normal(draw.rows, width))
    indices = by_parts(lambda part: module(part)[1], latents)
    decoded = by_parts(module.from_codes, indices)
    flags = ("--kind", "residual_fsq", "--levels", ",".join(map(str, levels)), "--stages", "1")
    flags = (*flags, "--library-version", "1.17.8", "--layout", "channels_last")
    state = named(module, "quantizer.")
    return golden("transformers", state, latents, indices, decoded, suffix=".safetensors", flags=flags)


def _of_buffers(draw: Draw, module: nn.Module, codebooks: list[torch.Tensor], rows: torch.Tensor) -> Golden:
    values = {}
    for stage, codebook in enumerate(codebooks):
        usage = draw.positive(len(codebook))
        where = f"quantizers.{stage}.codebook"
        values[f"{where}.embed"] = codebook
        values[f"{where}.cluster_size"] = usage
        values[f"{where}.embed_avg"] = codebook * usage[:, None]
        values[f"{where}.inited"] = torch.ones(1)
    fill(module, draw, **values)
    latents = draw.sequences(rows).movedim(-1, 1).contiguous()
    indices = by_parts(lambda part: module.encode(part).movedim(0, 1), latents)
    decoded = by_parts(lambda part: module.decode(part.movedim(1, 0)), indices)
    return golden("transformers", named(module, "quantizer."), latents, indices, decoded, suffix=".safetensors")
