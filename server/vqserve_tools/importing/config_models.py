"""Which paths of a model's configuration describe its quantizer: one row for each model, with its source."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vqserve_server.quantizers.declared import Metric

_LARGEST = 1 << 32
# Where models have the configuration of a codec inside.
INNER = ("audio_encoder", "audio_encoder_config", "codec_config", "vq_config")
_MAX_RATIOS = 64


def is_size(value: object) -> bool:
    """Return whether a value is an integer that can be a size."""
    return type(value) is int and 0 < value < _LARGEST


@dataclass(frozen=True)
class Row:
    """The paths of one model's configuration; dots go into inner objects.

    Attributes:
        model: name for messages.
        names: values of `model_type`, `_class_name` or `architectures` that the model has; none: it has all of `paths`.
        paths: path of each fact: stages (number of indices per token), codes (of a codebook), width (of a code), levels
            (of finite scalar quantization), l2_norm (whether codes are searched by cosine). The first path that exists
            counts.
        metric: metric of all models of this name, which their keys do not tell; such a row has a `place`.
        stages_of: function that computes the number of stages from a configuration that does not have it.
        place: last module of the quantizer's prefix, if the model has further quantizers.
        unlike: kinds that the quantizer looks like, with the reason why it is of another kind.
    """

    model: str
    names: tuple[str, ...]
    paths: Mapping[str, tuple[str, ...]]
    metric: Metric | None = None
    stages_of: Callable[[Mapping[str, Any]], int | None] | None = None
    place: str = ""
    unlike: Mapping[str, str] = field(default_factory=dict)


def _stages_of_bandwidth(config: Mapping[str, Any], rate: Any, ratios: object) -> int | None:
    """Return the number of stages at the greatest bandwidth, as EnCodec's configuration in transformers computes it."""
    bandwidths: object = config.get("target_bandwidths")
    codes: Any = config.get("codebook_size")
    if not isinstance(bandwidths, list) or not bandwidths:
        return None
    if not isinstance(ratios, list) or len(ratios) > _MAX_RATIOS:
        return None
    bandwidth = bandwidths[-1]
    if type(bandwidth) not in (int, float) or not 0 < bandwidth < _LARGEST:
        return None
    if not all(is_size(number) for number in (rate, codes, *ratios)):
        return None
    bits = math.ceil(math.log2(codes))
    frames = -(-rate // math.prod(ratios))
    return int(1000 * bandwidth // (frames * bits)) if bits else None


def _encodec_stages(config: Mapping[str, Any]) -> int | None:
    return _stages_of_bandwidth(config, config.get("sampling_rate"), config.get("upsampling_ratios"))


def _xcodec_stages(config: Mapping[str, Any]) -> int | None:
    acoustic = config.get("acoustic_model_config")
    ratios = acoustic.get("downsampling_ratios") if isinstance(acoustic, dict) else None
    return _stages_of_bandwidth(config, config.get("sample_rate"), ratios)


# The source of each row is the class that writes the configuration.
ROWS: tuple[Row, ...] = (
    # transformers, models/encodec/configuration_encodec.py: EncodecConfig.
    Row(
        "EnCodec",
        ("encodec",),
        {"codes": ("codebook_size",), "width": ("codebook_dim",)},
        stages_of=_encodec_stages,
    ),
    # transformers, models/dac/configuration_dac.py: DacConfig; Parler-TTS, dac_wrapper/configuration_dac.py: DACConfig.
    Row(
        "DAC",
        ("dac",),
        {"stages": ("n_codebooks", "num_codebooks"), "codes": ("codebook_size",), "width": ("codebook_dim",)},
    ),
    # transformers, models/mimi/configuration_mimi.py: MimiConfig.
    Row(
        "Mimi",
        ("mimi",),
        {"stages": ("num_quantizers",), "codes": ("codebook_size",), "width": ("codebook_dim",)},
    ),
    # transformers, models/xcodec/configuration_xcodec.py: XcodecConfig.
    Row(
        "X-Codec",
        ("xcodec",),
        {"codes": ("codebook_size",), "width": ("codebook_dim",)},
        stages_of=_xcodec_stages,
    ),
    # transformers, models/higgs_audio_v2_tokenizer/configuration_higgs_audio_v2_tokenizer.py.
    Row(
        "Higgs Audio",
        ("higgs_audio_v2_tokenizer",),
        {"codes": ("codebook_size",), "width": ("codebook_dim",)},
        stages_of=_xcodec_stages,
    ),
    # transformers, models/xcodec2/configuration_xcodec2.py: Xcodec2Config.
    Row(
        "X-Codec 2",
        ("xcodec2",),
        {"levels": ("quantization_levels",)},
        unlike={"fsq": "its quantizer is a ResidualFSQ, which bounds latents twice and gives other tokens"},
    ),
    # transformers, models/moss_audio_tokenizer/configuration_moss_audio_tokenizer.py (quantizer_config), and the code
    # beside the published weights, configuration_moss_audio_tokenizer.py (quantizer_kwargs).
    Row(
        "MOSS-Audio-Tokenizer",
        ("moss_audio_tokenizer", "moss-audio-tokenizer", "MossAudioTokenizerModel"),
        {
            "stages": ("quantizer_config.n_codebooks", "quantizer_kwargs.num_quantizers"),
            "codes": ("quantizer_config.codebook_size", "quantizer_kwargs.codebook_size"),
            "width": ("quantizer_config.codebook_dim", "quantizer_kwargs.codebook_dim"),
        },
    ),
    # diffusers, models/autoencoders/vq_model.py: VQModel; the second names are those of its first version.
    Row(
        "diffusers' VQModel",
        ("VQModel",),
        {"codes": ("num_vq_embeddings", "n_embed"), "width": ("vq_embed_dim",)},
        metric="l2",
        place="quantize",
    ),
    # transformers, models/chameleon/configuration_chameleon.py: ChameleonVQVAEConfig.
    Row(
        "Chameleon",
        ("chameleon_vqgan",),
        {"codes": ("num_embeddings",), "width": ("embed_dim",)},
        metric="l2",
        place="quantize",
    ),
    # transformers, models/janus/configuration_janus.py: JanusVQVAEConfig.
    Row("Janus", ("janus_vqgan",), {"codes": ("num_embeddings",), "width": ("embed_dim",)}, place="quantize"),
    # BAAI/Emu3-VisionTokenizer, configuration_emu3visionvq.py; transformers, models/emu3/configuration_emu3.py.
    Row(
        "Emu3",
        ("Emu3VisionVQ", "Emu3VisionVQModel", "emu3_vqgan"),
        {"codes": ("codebook_size",), "width": ("embed_dim",)},
        metric="l2",
        place="quantize",
    ),
    # bytedance/1d-tokenizer, modeling/titok.py.
    Row(
        "TiTok",
        (),
        {
            "codes": ("model.vq_model.codebook_size",),
            "width": ("model.vq_model.token_size",),
            "l2_norm": ("model.vq_model.use_l2_norm",),
        },
        place="quantize",
    ),
    # FoundationVision/LlamaGen, tokenizer/tokenizer_image/vq_model.py: ModelArgs.
    Row(
        "LlamaGen",
        (),
        {"codes": ("codebook_size",), "width": ("codebook_embed_dim",), "l2_norm": ("codebook_l2_norm",)},
        place="quantize",
    ),
)
# Of a model that is not known: names that mean one thing.
UNKNOWN = Row(
    "a model that is not known here",
    (),
    {
        "stages": ("num_quantizers", "n_q", "n_codebooks"),
        "codes": ("codebook_size", "n_embed", "num_embeddings"),
        "levels": ("fsq_levels", "quantization_levels"),
    },
)
