"""Codecs of 2025 and 2026, with the keys and formulas of their own code."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from support.brute_force import nearest
from support.foreign.audio import encodec_codebook, mimi_case, narrow_stages
from support.foreign.case import (
    C,
    Case,
    D,
    K,
    Oracle,
    affine,
    by_cosine,
    case,
    chain,
    layer,
    linear,
    normal,
    plain,
    projected,
    table,
)

NARROW = 2
MOSS_METRIC = ("--metric", "pass --metric l2 or --metric cosine")


def between(into: Callable[[np.ndarray], np.ndarray], inner: Oracle, out: Callable[[np.ndarray], np.ndarray]) -> Oracle:
    """Return the formula of a quantizer between two layers."""

    def oracle(z):
        indices, decoded = inner(into(z))
        return indices, out(decoded)

    return oracle


@case
def xcodec() -> Case:
    codes, arrays = normal(4, K, D), {"fc.weight": normal(D, D), "fc2.weight": normal(2, D)}
    for i, stage in enumerate(codes):
        arrays |= encodec_codebook(f"quantizer.quantizers.{i}.codebook", stage)
    stages = [plain(stage) for stage in codes]
    return Case(".safetensors", arrays, lambda z: chain(z, stages), D, "rvq", "XCodec", [], "",
                ["fc.weight", "fc2.weight"])  # fmt: skip


@case
def higgs_audio_v2() -> Case:
    codes, arrays, stages = normal(3, K, D), {}, []
    for i, stage in enumerate(codes):
        at = f"quantizer.quantizers.{i}."
        arrays |= encodec_codebook(f"{at}codebook", stage)
        arrays |= linear(f"{at}project_in", C, D) | linear(f"{at}project_out", D, C)
        stages.append(projected(arrays, at, plain(stage)))
    return Case(".safetensors", arrays, lambda z: chain(z, stages), C, "rvq", "Higgs Audio v2 under quantizer.")


def repcodec_case(search=by_cosine, *flags: str) -> Case:
    arrays: dict[str, np.ndarray] = {"encoder.0.embed.bias": normal(2)}
    at = "quantizer.quantizers."
    stages = narrow_stages(arrays, at, normal(1, K, NARROW), C, "old", search, ("in_project", "out_project"))
    return Case(".safetensors", arrays, lambda z: chain(z, stages), C, "rvq", "RepCodec under quantizer.", [*flags],
                "", ["encoder.0.embed.bias"])  # fmt: skip


@case
def repcodec() -> Case:
    return repcodec_case()


@case
def repcodec_by_distance() -> Case:
    return repcodec_case(nearest, "--metric", "l2")


def moss_case(search, metric: str) -> Case:
    arrays: dict[str, np.ndarray] = {"encoder.0.bias": normal(2)}
    into = layer(arrays, "quantizer.input_proj", 7, C, "new")
    stages = narrow_stages(arrays, "quantizer.quantizers.", normal(4, K, NARROW), C, "new", search)
    out = layer(arrays, "quantizer.output_proj", C, 7, "new")
    oracle = between(into, lambda z: chain(z, stages), out)
    return Case(".safetensors", arrays, oracle, 7, "rvq", "MOSS-Audio-Tokenizer", ["--metric", metric], "",
                ["encoder.0.bias"], MOSS_METRIC)  # fmt: skip


@case
def moss_audio_tokenizer() -> Case:
    return moss_case(by_cosine, "cosine")


@case
def moss_audio_tokenizer_by_distance() -> Case:
    return moss_case(nearest, "l2")


@case
def fish_speech() -> Case:
    arrays = {f"quantizer.{name}": normal(2, 2) for name in ("downsample.0.0.conv.weight", "pre_module.norm.weight")}
    semantic = narrow_stages(arrays, "quantizer.semantic_quantizer.quantizers.", normal(1, 3 * K, NARROW), C, "new")
    acoustic = narrow_stages(arrays, "quantizer.quantizer.quantizers.", normal(3, K, NARROW), C, "new")
    stages = [*semantic, *acoustic]
    return Case(".pth", arrays, lambda z: chain(z, stages), C, "rvq", "fish-speech under quantizer.", [], "",
                ["quantizer.downsample.0.0.conv.weight"])  # fmt: skip


def xy_case(narrow: int | None) -> Case:
    codes = normal(3, K, narrow or C)
    arrays: dict[str, np.ndarray] = {"semantic_encoder.conv.bias": normal(2)}
    into = layer(arrays, "quantizer.input_proj", 7, C, "old")
    out = layer(arrays, "quantizer.output_proj", C, 7, "old")
    stages = []
    for i, stage in enumerate(codes):
        at = f"quantizer.quantizers.{i}."
        arrays |= {
            f"{at}codebook": stage,
            f"{at}inited": np.ones(1, bool),
            f"{at}cluster_size": normal(K) ** 2,
            f"{at}embed_avg": normal(*stage.shape),
        }
        if narrow is None:
            stages.append(plain(stage))
        else:
            inside = layer(arrays, f"{at}in_project", C, narrow, "old")
            outside = layer(arrays, f"{at}out_project", narrow, C, "old")
            stages.append(between(inside, plain(stage), outside))
    oracle = between(into, lambda z: chain(z, stages), out)
    return Case(".ckpt", arrays, oracle, 7, "rvq", "XY-Tokenizer under quantizer.", [], "state_dict",
                ["semantic_encoder.conv.bias"])  # fmt: skip


@case
def xy_tokenizer() -> Case:
    return xy_case(None)


@case
def xy_tokenizer_with_narrow_stages() -> Case:
    return xy_case(NARROW)


def qwen_25hz_case(count: int, width: int) -> Case:
    codes = normal(count, K, D)
    at = "encoder.audio_quantizer.rvqs.0."
    arrays = {
        f"{at}embed": codes,
        f"{at}embed_avg": normal(count, K, D),
        f"{at}cluster_size": normal(count, K) ** 2,
        f"{at}inited": np.ones((count, 1), np.float32),
        "encoder.conv1.bias": normal(2),
    }
    stages = []
    for i, stage in enumerate(codes):
        if width == D:
            stages.append(plain(stage))
            continue
        arrays |= linear(f"{at}layers.{i}.project_in", width, D) | linear(f"{at}layers.{i}.project_out", D, width)
        stages.append(projected(arrays, f"{at}layers.{i}.", plain(stage)))
    oracle: Oracle = (lambda z: chain(z, stages)) if count > 1 else stages[0]
    kind = "rvq" if count > 1 else "vq" if width == D else "vq_projection"
    return Case(".safetensors", arrays, oracle, width, kind, "Qwen 25 Hz", [], "", ["encoder.conv1.bias"])


@case
def qwen_25hz() -> Case:
    return qwen_25hz_case(1, D)


@case
def qwen_25hz_projected() -> Case:
    return qwen_25hz_case(1, C)


@case
def qwen_25hz_residual() -> Case:
    return qwen_25hz_case(3, C)


@case
def qwen_12hz() -> Case:
    """Mimi's encoder, beside a decoder whose codebooks are learnt anew from the same tokens."""
    parts = ("semantic_residual_vector_quantizer", "acoustic_residual_vector_quantizer")
    names = ("codebook.embed_sum", "codebook.cluster_usage", "codebook.initialized")
    made = mimi_case(".safetensors", parts, "layers", names)
    arrays = {f"encoder.{name}": array for name, array in made.arrays.items()}
    decoder = mimi_case(
        ".safetensors",
        ("rvq_first", "rvq_rest"),
        "vq.layers",
        ("_codebook.embedding_sum", "_codebook.cluster_usage", "_codebook.initted"),
    )
    arrays |= {f"decoder.{name}": array for name, array in decoder.arrays.items() if "initted" not in name}
    made.arrays, made.flags = arrays, ["--prefix", "encoder.quantizer."]
    made.found, made.left = "Mimi under encoder.quantizer.", ["encoder.decoder.bias"]
    made.asks = ("--prefix", "it has several quantizers: choose one with --prefix decoder.quantizer.")
    return made


@case
def whisper_vq() -> Case:
    codes = normal(K, D)
    around = {"embed_positions2.weight": normal(5, D), "ema_count": normal(K) ** 2, "ema_weight": normal(K, D)}
    arrays = {"codebook.weight": codes, "conv1.bias": normal(2), **around}
    return Case(".safetensors", arrays, table(codes), D, "vq", "WhisperVQ", [], "", ["conv1.bias", *around])


@case
def s3_tokenizer() -> Case:
    arrays = {f"quantizer._codebook.{name}": array for name, array in linear("project_down", C, 8).items()}
    arrays["encoder.conv1.bias"] = normal(2)
    at = "quantizer._codebook.project_down"

    def oracle(z):
        bounded = np.tanh(affine(z, arrays[f"{at}.weight"], arrays[f"{at}.bias"])) * 0.9990000128746033
        digits = np.round(bounded)
        return ((digits + 1) * 3 ** np.arange(8)).sum(axis=1).astype(int), digits

    return Case(".pt", arrays, oracle, C, "fsq", "S3Tokenizer under quantizer.", [], "",
                ["encoder.conv1.bias"])  # fmt: skip
