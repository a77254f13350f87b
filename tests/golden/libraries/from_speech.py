"""Speech tokenizers of 2025: fish-speech, Qwen's at 25 Hz, S3Tokenizer. Only the quantizers' modules are imported."""

from __future__ import annotations

import torch
from torch import Tensor

from libraries.draw import Draw, by_parts
from libraries.golden import Golden
from libraries.library import array, fill, golden, module_alone, named, pretend


def fish_speech(draw: Draw) -> Golden:
    """Make fish-speech's: a semantic stage, then acoustic ones with fewer codes, all of them DAC's (fish-speech)."""
    # dac's own __init__ needs audio front ends.
    module_alone("dac.nn.quantize")
    stages, sizes, width = draw.size(3, 9), draw.size((96, 64), (4096, 1024)), draw.size(32, 1024)
    module = module_alone("fish_speech.models.dac.rvq").DownsampleResidualVectorQuantize(
        input_dim=width,
        n_codebooks=stages,
        codebook_size=sizes[1],
        semantic_codebook_size=sizes[0],
        downsample_factor=(),
    )
    values = {"semantic_quantizer.quantizers.0.codebook.weight": draw.codes(sizes[0], 8)}
    values |= {f"quantizer.quantizers.{stage}.codebook.weight": draw.codes(sizes[1], 8) for stage in range(stages)}
    fill(module, draw, **values)
    latents = draw.sequences(draw.normal(draw.rows, width)).movedim(-1, 1).contiguous()
    indices = by_parts(lambda part: module(part).codes, latents)
    decoded = by_parts(module.decode, indices)
    # Between the encoder and the codes; left out above, so that the latents are what the codes quantize.
    around = {
        "quantizer.downsample.0.0.conv.weight": array(draw.normal(4, 4, 2)),
        "quantizer.pre_module.norm.weight": array(draw.normal(4)),
        "quantizer.post_module.norm.weight": array(draw.normal(4)),
        "quantizer.upsample.0.0.conv.weight": array(draw.normal(4, 4, 2)),
    }
    return golden("fish-speech", named(module, "quantizer.") | around, latents, indices, decoded, suffix=".pth")


def qwen_25hz(draw: Draw) -> Golden:
    """Make the tokenizer of Qwen3-TTS at 25 Hz: one stage of wide codes (qwen-tts)."""
    return _qwen_25hz(draw, stages=1, codes=draw.size(128, 32768), inner=None, width=draw.size(24, 1280))


def qwen_25hz_residual(draw: Draw) -> Golden:
    """Make the same library's residual one, behind projections."""
    stages, width = draw.size(3, 8), draw.size(16, 512)
    return _qwen_25hz(draw, stages=stages, codes=draw.size(64, 1024), inner=draw.size(8, 64), width=width)


def s3_tokenizer(draw: Draw) -> Golden:
    """Make CosyVoice 2's and 3's: a projection, and three values for each of eight channels (s3tokenizer)."""
    # They make sound into what the encoder takes.
    pretend("onnx", "torchaudio")
    width = draw.size(24, 1280)
    module = module_alone("s3tokenizer.model_v2").FSQVectorQuantization(dim=width, codebook_size=3**8)
    fill(module, draw)
    latents = draw.sequences(2 * draw.normal(draw.rows, width))
    indices = by_parts(module.encode, latents).long()
    # The library decodes nothing: this is what its own comment says of an index.
    digits = indices[..., None] // 3 ** torch.arange(8) % 3 - 1
    return golden("s3tokenizer", named(module, "quantizer."), latents, indices, digits.float(), suffix=".pt")


def _qwen_25hz(draw: Draw, *, stages: int, codes: int, inner: int | None, width: int) -> Golden:
    library = module_alone("qwen_tts.core.tokenizer_25hz.vq.core_vq")
    module = library.DistributedGroupResidualVectorQuantization(
        num_groups=1, num_quantizers=stages, dim=width, codebook_dim=inner, codebook_size=codes, kmeans_init=False
    )
    codebooks = [draw.codes(codes, inner or width, 0.7**stage) for stage in range(stages)]
    usage = draw.positive(stages, codes)
    embed = torch.stack(codebooks)
    values: dict[str, Tensor] = {
        "rvqs.0.embed": embed,
        "rvqs.0.cluster_size": usage,
        "rvqs.0.embed_avg": embed * usage[..., None],
        "rvqs.0.inited": torch.ones(stages, 1),
    }
    fill(module, draw, **values)
    latents = draw.sequences(draw.near(codebooks) if inner is None else 1.5 * draw.normal(draw.rows, width))
    # Theirs are (n_q, groups, b, t).
    indices = by_parts(lambda part: module.encode(part)[:, 0].permute(1, 2, 0), latents)
    decoded = by_parts(lambda part: module.decode(part.permute(2, 0, 1)[:, None]), indices)
    if stages == 1:
        indices = indices[..., 0]
    flags = ("--layout", "channels_last") if stages > 1 else ()
    state = named(module, "encoder.audio_quantizer.")
    return golden("qwen-tts", state, latents, indices, decoded, suffix=".safetensors", flags=flags)
