"""Codecs: EnCodec, DAC, Mimi and those with their keys."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
)


def encodec_codebook(at: str, codes: np.ndarray) -> dict[str, np.ndarray]:
    return {
        f"{at}.inited": np.ones(1, np.float32),
        f"{at}.cluster_size": normal(len(codes)) ** 2,
        f"{at}.embed": codes,
        f"{at}.embed_avg": normal(*codes.shape),
    }


def encodec_case(suffix: str, at: str, codebook: str, codes: np.ndarray, wrap: str = "", **other: np.ndarray) -> Case:
    arrays = dict(other)
    for i, stage in enumerate(codes):
        arrays |= encodec_codebook(f"{at}layers.{i}.{codebook}", stage)
    stages = [plain(stage) for stage in codes]
    return Case(suffix, arrays, lambda z: chain(z, stages), codes.shape[2], "rvq", f"EnCodec under {at}", [], wrap,
                [f"{at}layers.0.{codebook}.cluster_size", *other])  # fmt: skip


@case
def encodec() -> Case:
    return encodec_case(
        ".th", "quantizer.vq.", "_codebook", normal(4, K, D), **{"encoder.model.0.conv.bias": normal(2)}
    )


@case
def encodec_transformers() -> Case:
    return encodec_case(".safetensors", "quantizer.", "codebook", normal(4, K, D))


@case
def encodec_projected() -> Case:
    codes = normal(2, K, D)
    arrays, stages = {}, []
    for i, stage in enumerate(codes):
        at = f"quantizer.vq.layers.{i}."
        arrays |= encodec_codebook(f"{at}_codebook", stage)
        arrays |= linear(f"{at}project_in", C, D) | linear(f"{at}project_out", D, C)
        stages.append(projected(arrays, at, plain(stage)))
    return Case(".th", arrays, lambda z: chain(z, stages), C, "rvq", "EnCodec under quantizer.vq.")


@case
def speech_tokenizer() -> Case:
    return encodec_case(".pt", "quantizer.vq.", "_codebook", normal(3, K, D), **{"transform.weight": normal(3, 2)})


@case
def wav_tokenizer() -> Case:
    at = "feature_extractor.encodec.quantizer.vq."
    return encodec_case(".ckpt", at, "_codebook", normal(1, K, D), "state_dict", **{"head.out.weight": normal(3, 2)})


def narrow_stages(
    arrays: dict[str, np.ndarray],
    at: str,
    codes: Sequence[np.ndarray],
    width: int,
    naming: str,
    search=by_cosine,
    names: tuple[str, str] = ("in_proj", "out_proj"),
) -> list[Oracle]:
    """Add stages as DAC has them below `at`, and return their formulas."""
    stages = []
    for i, stage_codes in enumerate(codes):
        arrays[f"{at}{i}.codebook.weight"] = stage_codes
        into = layer(arrays, f"{at}{i}.{names[0]}", width, stage_codes.shape[1], naming)
        out = layer(arrays, f"{at}{i}.{names[1]}", stage_codes.shape[1], width, naming)

        def stage(z, codes=stage_codes, into=into, out=out):
            indices = search(into(z), codes)
            return indices, out(codes.astype(np.float64)[indices])

        stages.append(stage)
    return stages


def dac_case(suffix: str, naming: str) -> Case:
    arrays: dict[str, np.ndarray] = {}
    stages = narrow_stages(arrays, "quantizer.quantizers.", normal(3, K, 2), C, naming)
    arrays["encoder.block.0.bias"] = normal(2)
    return Case(suffix, arrays, lambda z: chain(z, stages), C, "rvq", "DAC under quantizer.", [],
                "state_dict" if naming == "old" else "", ["encoder.block.0.bias"])  # fmt: skip


@case
def dac() -> Case:
    return dac_case(".pth", "old")


@case
def dac_parametrized() -> Case:
    return dac_case(".pth", "new")


@case
def dac_transformers() -> Case:
    return dac_case(".safetensors", "plain")


def mimi_case(suffix: str, parts: tuple[str, str], layers: str, names: tuple[str, str, str]) -> Case:
    arrays, chains = {}, []
    for part, count in zip(parts, (1, 3), strict=True):
        w_in, w_out, stages = normal(D, C, 1), normal(C, D, 1), []
        arrays |= {f"quantizer.{part}.input_proj.weight": w_in, f"quantizer.{part}.output_proj.weight": w_out}
        for i in range(count):
            at = f"quantizer.{part}.{layers}.{i}."
            sums, usage = normal(K, D), np.abs(normal(K)) + 0.1
            # A code that was never met, whose sum is zero, and one that hardly was.
            sums[3], usage[3] = 0, 0
            sums[4], usage[4] = 1e-6, 1e-7
            arrays |= {f"{at}{names[0]}": sums, f"{at}{names[1]}": usage, f"{at}{names[2]}": np.ones(1, np.float32)}
            stages.append(plain(sums.astype(np.float64) / np.maximum(usage.astype(np.float64), 1e-5)[:, None]))
        chains.append((w_in[:, :, 0], stages, w_out[:, :, 0]))

    def oracle(z):
        # Both see the input, and their outputs are added.
        found = [(chain(affine(z, w_in), stages), w_out) for w_in, stages, w_out in chains]
        indices = np.concatenate([part[0] for part, _ in found], axis=1)
        return indices, sum(affine(part[1], w_out) for part, w_out in found)

    arrays["decoder.bias"] = normal(3)
    return Case(suffix, arrays, oracle, C, "rvq", "Mimi under quantizer.", [], "", ["decoder.bias"])


@case
def mimi() -> Case:
    names = ("_codebook.embedding_sum", "_codebook.cluster_usage", "_codebook._initialized")
    return mimi_case(".safetensors", ("rvq_first", "rvq_rest"), "vq.layers", names)


@case
def mimi_transformers() -> Case:
    parts = ("semantic_residual_vector_quantizer", "acoustic_residual_vector_quantizer")
    names = ("codebook.embed_sum", "codebook.cluster_usage", "codebook.initialized")
    return mimi_case(".safetensors", parts, "layers", names)
