"""A small checkpoint of every foreign family, imported by the command line and held against the family's formula.

The formulas are written here once more, in float64 and by brute force, from the models' papers and code; the numbers
that the libraries themselves give are another test's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from support.brute_force import nearest
from vqserve_client import Client
from vqserve_server.codebooks import load_codebook
from vqserve_server.tokenizer import Tokenizer
from vqserve_tools import cli

RNG = np.random.default_rng(5)
N, K, D, C = 200, 12, 4, 6


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


# The searches, on rows (n, D) float64.


def by_cosine(z: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return np.argmax(unit(z) @ unit(codes).T, axis=1)


def by_product(z: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return np.argmax(z @ codes.astype(np.float64).T, axis=1)


def chain(
    z: np.ndarray, stages: Sequence[Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return indices (n, q) and sums (n, D) of stages that give indices and what they decode to."""
    residual, total, indices = z, np.zeros_like(z), []
    for stage in stages:
        found, decoded = stage(residual)
        indices.append(found)
        residual, total = residual - decoded, total + decoded
    return np.stack(indices, axis=1), total


def plain(codes: np.ndarray, search=nearest):
    def stage(z):
        indices = search(z, codes)
        return indices, codes.astype(np.float64)[indices]

    return stage


def affine(rows: np.ndarray, weight: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
    return rows.astype(np.float64) @ weight.astype(np.float64).T + bias


Oracle = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass
class Case:
    """A checkpoint: its arrays, what is said of it, and what must come of it.

    `oracle` maps latents (n, channels) float64 to indices (n,) or (n, q), and decoded latents (n, channels).
    """

    suffix: str
    arrays: dict[str, np.ndarray]
    oracle: Oracle
    channels: int
    kind: str
    found: str
    flags: list[str] = field(default_factory=list)
    wrap: str = ""
    left: list[str] = field(default_factory=list)
    # What must be said, and how the error asks for it if it is not.
    asks: tuple[str, str] | None = None


CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    CASES[make.__name__] = make
    return make


def autoencoder() -> dict[str, np.ndarray]:
    """The layers around a taming quantizer, which are left."""
    return {
        "encoder.conv_in.weight": normal(8, 3, 3, 3),
        "quant_conv.weight": normal(D, D, 1, 1),
        "quant_conv.bias": normal(D),
        "post_quant_conv.weight": normal(D, D, 1, 1),
        "decoder.conv_out.bias": normal(3),
    }


LEFT = ["encoder.conv_in.weight", "quant_conv.weight", "post_quant_conv.weight", "decoder.conv_out.bias"]
METRIC = ("--metric", "pass --metric l2 or --metric cosine or --metric dot")


def table(codes: np.ndarray, search=nearest, rows: np.ndarray | None = None) -> Oracle:
    decoded = codes.astype(np.float64) if rows is None else rows

    def oracle(z):
        indices = search(z, codes)
        return indices, decoded[indices]

    return oracle


@case
def sgm() -> Case:
    codes = normal(K, D)
    arrays = {"regularization.embedding.weight": codes, "encoder.w": normal(2), "loss.w": normal(2)}
    return Case(".ckpt", arrays, table(codes), D, "vq", "taming-transformers or sgm under regularization.", [],
                "state_dict", ["encoder.w", "loss.w"])  # fmt: skip


@case
def sgm_projected() -> Case:
    codes, w_in, b_in, w_out, b_out = normal(K, D), normal(D, C), normal(D), normal(C, D), normal(C)
    at = "regularization."
    arrays = {
        f"{at}embedding.weight": codes,
        f"{at}proj_in.weight": w_in,
        f"{at}proj_in.bias": b_in,
        f"{at}proj_out.weight": w_out,
        f"{at}proj_out.bias": b_out,
    }

    def oracle(z):
        indices, decoded = table(codes)(affine(z, w_in, b_in))
        return indices, affine(decoded, w_out, b_out)

    return Case(".safetensors", arrays, oracle, C, "vq_projection", "sgm under regularization.")


@case
def sgm_ema() -> Case:
    codes = normal(K, D)
    at = "model.regularization.embedding."
    arrays = {f"{at}weight": codes, f"{at}cluster_size": normal(K) ** 2, f"{at}embed_avg": normal(K, D)}
    return Case(".ckpt", arrays, table(codes), D, "ema", "sgm under model.regularization.", [], "state_dict")


def logits_oracle(weight: np.ndarray, bias: np.ndarray, codes: np.ndarray) -> Oracle:
    def oracle(z):
        indices = np.argmax(affine(z, weight[:, :, 0, 0], bias), axis=1)
        return indices, codes.astype(np.float64)[indices]

    return oracle


@case
def sgm_gumbel() -> Case:
    weight, bias, codes = normal(K, C, 1, 1), normal(K), normal(K, C)
    at = "regularization."
    arrays = {f"{at}proj.weight": weight, f"{at}proj.bias": bias, f"{at}embed.weight": codes}
    return Case(".ckpt", arrays, logits_oracle(weight, bias, codes), C, "gumbel", "a Gumbel quantizer of taming")


@case
def taming() -> Case:
    codes = normal(K, D)
    arrays = {"quantize.embedding.weight": codes, **autoencoder()}
    return Case(".ckpt", arrays, table(codes), D, "vq", "under quantize.", ["--metric", "l2"], "state_dict", LEFT,
                METRIC)  # fmt: skip


@case
def taming_gumbel() -> Case:
    weight, bias, codes = normal(K, C, 1, 1), normal(K), normal(K, C)
    arrays = {"quantize.embed.weight": codes, "quantize.proj.weight": weight, "quantize.proj.bias": bias}
    return Case(".ckpt", {**arrays, **autoencoder()}, logits_oracle(weight, bias, codes), C, "gumbel",
                "under quantize.", [], "state_dict", LEFT)  # fmt: skip


@case
def latent_diffusion() -> Case:
    codes = normal(K, 3)
    arrays = {"quantize.embedding.weight": codes, "model_ema.quantizeembeddingweight": codes + 1, **autoencoder()}
    return Case(".ckpt", arrays, table(codes), 3, "vq", "under quantize.", ["--metric", "l2"], "state_dict",
                ["model_ema.quantizeembeddingweight", *LEFT], METRIC)  # fmt: skip


@case
def latent_diffusion_average() -> Case:
    codes = normal(K, 3)
    average = "model_ema.quantizeembeddingweight"
    arrays = {"quantize.embedding.weight": codes + 1, average: codes, **autoencoder()}
    return Case(".ckpt", arrays, table(codes), 3, "vq", "an array of codes", ["--key", average, "--metric", "l2"],
                "state_dict", ["quantize.embedding.weight", *LEFT], METRIC)  # fmt: skip


@case
def diffusers() -> Case:
    codes = normal(K, D)
    arrays = {"quantize.embedding.weight": codes, **autoencoder()}
    return Case(".safetensors", arrays, table(codes), D, "vq", "under quantize.", ["--metric", "l2"], "", LEFT, METRIC)


@case
def amused() -> Case:
    codes = normal(32, 64)
    arrays = {"quantize.embedding.weight": codes, **autoencoder()}
    return Case(".safetensors", arrays, table(codes), 64, "vq", "under quantize.", ["--metric", "l2"], "", LEFT, METRIC)


@case
def llamagen() -> Case:
    codes = normal(K, 8)
    arrays = {"quantize.embedding.weight": codes, "quantize.codebook_used": np.zeros(65536, np.float32)}
    return Case(".pt", {**arrays, **autoencoder()}, table(codes, by_cosine, unit(codes)), 8, "cosine",
                "LlamaGen under quantize.", [], "model", ["quantize.codebook_used", *LEFT])  # fmt: skip


@case
def titok_cosine() -> Case:
    codes = normal(K, 12)
    arrays = {
        "quantize.embedding.weight": codes,
        "pixel_quantize.embedding.weight": normal(K, 7),
        "latent_tokens": normal(32, 8),
    }
    return Case(".bin", arrays, table(codes, by_cosine, unit(codes)), 12, "cosine", "TiTok under quantize.",
                ["--metric", "cosine"], "", ["pixel_quantize.embedding.weight", "latent_tokens"], METRIC)  # fmt: skip


@case
def titok_distance() -> Case:
    codes = normal(K, 64)
    arrays = {"quantize.embedding.weight": codes, "latent_tokens": normal(32, 8)}
    return Case(".bin", arrays, table(codes), 64, "vq", "TiTok under quantize.", ["--metric", "l2"], "",
                ["latent_tokens"], METRIC)  # fmt: skip


@case
def ibq() -> Case:
    codes = normal(K, D)
    arrays = {"quantize.embedding.weight": codes, **autoencoder()}
    return Case(".ckpt", arrays, table(codes, by_product), D, "dot", "under quantize.", ["--metric", "dot"],
                "state_dict", LEFT, METRIC)  # fmt: skip


@case
def chameleon() -> Case:
    codes = normal(K, D)
    at = "model.vqmodel."
    arrays = {f"{at}{name}": array for name, array in autoencoder().items()}
    arrays |= {f"{at}quantize.embedding.weight": codes, "lm_head.weight": normal(3, 2)}
    return Case(".safetensors", arrays, table(codes), D, "vq", f"under {at}quantize.", ["--metric", "l2"], "",
                [f"{at}quant_conv.weight", "lm_head.weight"], METRIC)  # fmt: skip


@case
def emu3() -> Case:
    codes = normal(K, D)
    arrays = {"quantize.embedding.weight": codes, "quant_conv.conv.weight": normal(4, 4, 3, 1, 1)}
    return Case(".safetensors", arrays, table(codes), D, "vq", "Emu3 under quantize.", [], "",
                ["quant_conv.conv.weight"])  # fmt: skip


LUCIDRAINS = ("--metric", "pass --metric l2 or --metric cosine")


def lucidrains_codebook(at: str, codes: np.ndarray) -> dict[str, np.ndarray]:
    heads = codes if codes.ndim == 3 else codes[None]
    return {
        f"{at}_codebook.initted": np.array(True),
        f"{at}_codebook.cluster_size": normal(*heads.shape[:2]) ** 2,
        f"{at}_codebook.embed_avg": normal(*heads.shape),
        f"{at}_codebook.embed": heads,
    }


def linear(at: str, inputs: int, outputs: int) -> dict[str, np.ndarray]:
    return {f"{at}.weight": normal(outputs, inputs), f"{at}.bias": normal(outputs)}


def projected(arrays: dict[str, np.ndarray], at: str, inner: Oracle) -> Oracle:
    def oracle(z):
        indices, decoded = inner(affine(z, arrays[f"{at}project_in.weight"], arrays[f"{at}project_in.bias"]))
        return indices, affine(decoded, arrays[f"{at}project_out.weight"], arrays[f"{at}project_out.bias"])

    return oracle


@case
def lucidrains_vq() -> Case:
    codes = normal(K, D)
    arrays = lucidrains_codebook("vq.", codes)
    return Case(".pt", arrays, table(codes), D, "vq", "VectorQuantize under vq.", ["--metric", "l2"], "",
                ["vq._codebook.embed_avg"], LUCIDRAINS)  # fmt: skip


@case
def lucidrains_cosine() -> Case:
    codes = unit(normal(K, D)).astype(np.float32)
    arrays = lucidrains_codebook("", codes)
    return Case(".pt", arrays, table(codes, by_cosine), D, "cosine", "VectorQuantize", ["--metric", "cosine"], "", [],
                LUCIDRAINS)  # fmt: skip


@case
def lucidrains_vq_projected() -> Case:
    codes = normal(K, D)
    arrays = lucidrains_codebook("", codes) | linear("project_in", C, D) | linear("project_out", D, C)
    return Case(".pt", arrays, projected(arrays, "", table(codes)), C, "vq_projection", "VectorQuantize",
                ["--metric", "l2"], "", [], LUCIDRAINS)  # fmt: skip


@case
def lucidrains_cosine_projected() -> Case:
    codes = unit(normal(K, D)).astype(np.float32)
    arrays = lucidrains_codebook("", codes) | linear("project_in", C, D) | linear("project_out", D, C)
    return Case(".pt", arrays, projected(arrays, "", table(codes, by_cosine)), C, "cosine", "VectorQuantize",
                ["--metric", "cosine"], "", [], LUCIDRAINS)  # fmt: skip


@case
def lucidrains_separate_heads() -> Case:
    codes = normal(3, K, 2)

    def oracle(z):
        parts = [plain(codes[head])(z[:, 2 * head : 2 * head + 2]) for head in range(3)]
        return np.stack([indices for indices, _ in parts], axis=1), np.concatenate([q for _, q in parts], axis=1)

    return Case(".pt", lucidrains_codebook("", codes), oracle, 6, "rvq", "VectorQuantize", ["--metric", "l2"], "", [],
                LUCIDRAINS)  # fmt: skip


def lucidrains_chain(at: str, codes: np.ndarray) -> dict[str, np.ndarray]:
    arrays = {}
    for i, stage in enumerate(codes):
        arrays |= lucidrains_codebook(f"{at}layers.{i}.", stage)
    return arrays


@case
def lucidrains_residual() -> Case:
    codes = normal(3, K, D)
    return Case(".pt", lucidrains_chain("rvq.", codes), lambda z: chain(z, [plain(stage) for stage in codes]), D, "rvq",
                "ResidualVQ under rvq.", ["--metric", "l2"], "", [], LUCIDRAINS)  # fmt: skip


@case
def lucidrains_residual_cosine() -> Case:
    codes = unit(normal(3, K, D)).astype(np.float32)
    stages = [plain(stage, by_cosine) for stage in codes]
    return Case(".pt", lucidrains_chain("", codes), lambda z: chain(z, stages), D, "rvq", "ResidualVQ",
                ["--metric", "cosine"], "", [], LUCIDRAINS)  # fmt: skip


@case
def lucidrains_residual_shared_and_projected() -> Case:
    codes = np.repeat(normal(1, K, D), 3, axis=0)
    arrays = lucidrains_chain("", codes) | linear("project_in", C, D) | linear("project_out", D, C)
    inner = projected(arrays, "", lambda z: chain(z, [plain(stage) for stage in codes]))
    return Case(".pt", arrays, inner, C, "rvq", "ResidualVQ", ["--metric", "l2"], "", [], LUCIDRAINS)


@case
def lucidrains_grouped() -> Case:
    codes = normal(2, 3, K, D)
    arrays = {}
    for group in range(2):
        at = f"rvqs.{group}."
        arrays |= lucidrains_chain(at, codes[group])
        arrays |= linear(f"{at}project_in", C, D) | linear(f"{at}project_out", D, C)

    def oracle(z):
        parts = []
        for group in range(2):
            stages = [plain(stage) for stage in codes[group]]
            inner = projected(arrays, f"rvqs.{group}.", lambda rows, stages=stages: chain(rows, stages))
            parts.append(inner(z[:, C * group : C * (group + 1)]))
        # All groups' first stages, then all second ones.
        indices = np.stack([part[0] for part in parts], axis=2).reshape(len(z), -1)
        return indices, np.concatenate([part[1] for part in parts], axis=1)

    return Case(".pt", arrays, oracle, 2 * C, "rvq", "GroupedResidualVQ", ["--metric", "l2"], "", [], LUCIDRAINS)


@case
def simvq() -> Case:
    frozen, weight = normal(K, 5), normal(D, 5)
    codes = affine(frozen, weight)
    arrays = {"frozen_codebook": frozen, "code_transform.weight": weight}
    return Case(".pt", arrays, table(codes), D, "vq", "SimVQ")


@case
def simvq_with_a_bias() -> Case:
    frozen, weight, bias = normal(K, 5), normal(D, 5), normal(D)
    arrays = {"q.frozen_codebook": frozen, "q.code_transform.weight": weight, "q.code_transform.bias": bias}
    return Case(".pt", arrays, table(affine(frozen, weight, bias)), D, "vq", "SimVQ under q.")


@case
def simvq_residual() -> Case:
    frozen, weight = normal(2, K, 5), normal(2, D, 5)
    arrays = {f"layers.{i}.frozen_codebook": frozen[i] for i in range(2)}
    arrays |= {f"layers.{i}.code_transform.weight": weight[i] for i in range(2)}
    stages = [plain(affine(frozen[i], weight[i])) for i in range(2)]
    return Case(".pt", arrays, lambda z: chain(z, stages), D, "rvq", "ResidualSimVQ")


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


def dac_case(suffix: str, naming: str) -> Case:
    codes, arrays, stages = normal(3, K, 2), {}, []

    def projection(at: str, inputs: int, outputs: int) -> Callable[[np.ndarray], np.ndarray]:
        v, g, bias = normal(outputs, inputs, 1), normal(outputs, 1, 1), normal(outputs)
        lengths = np.linalg.norm(v.astype(np.float64), axis=1, keepdims=True)
        weight = g.astype(np.float64) * v / lengths
        match naming:
            case "plain":
                weight = weight.astype(np.float32)
                arrays[f"{at}.weight"] = weight
            case "old":
                arrays.update({f"{at}.weight_g": g, f"{at}.weight_v": v})
            case "new":
                at_weight = f"{at}.parametrizations.weight."
                arrays.update({f"{at_weight}original0": g, f"{at_weight}original1": v})
        arrays[f"{at}.bias"] = bias
        return lambda rows: affine(rows, weight[:, :, 0], bias)

    for i, stage_codes in enumerate(codes):
        at = f"quantizer.quantizers.{i}."
        arrays[f"{at}codebook.weight"] = stage_codes
        into, out = projection(f"{at}in_proj", C, 2), projection(f"{at}out_proj", 2, C)

        def stage(z, codes=stage_codes, into=into, out=out):
            indices = by_cosine(into(z), codes)
            return indices, out(codes.astype(np.float64)[indices])

        stages.append(stage)
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


def fsq_oracle(levels: Sequence[int]) -> Oracle:
    """vector-quantize-pytorch's bound, which Cosmos has too."""
    sizes = np.array(levels)

    def oracle(z):
        half = (sizes - 1) * (1 + 1e-3) / 2
        offset = np.where(sizes % 2 == 0, 0.5, 0.0)
        digits = np.round(np.tanh(z + np.arctanh(offset / half)) * half - offset)
        basis = np.cumprod([1, *levels[:-1]])
        return ((digits + sizes // 2) * basis).sum(axis=1).astype(int), digits / (sizes // 2)

    return oracle


@case
def fsq_projected() -> Case:
    arrays = {**linear("quantizer.project_in", C, 3), **linear("quantizer.project_out", 3, C)}
    oracle = projected(arrays, "quantizer.", fsq_oracle([8, 5, 5]))
    flags = ["--kind", "fsq", "--levels", "8,5,5"]
    return Case(".pt", arrays, oracle, C, "fsq", "finite scalar quantization", flags, "", [], ("--levels", "--levels"))


@case
def cosmos() -> Case:
    flags = ["--kind", "fsq", "--levels", "8,8,8,5,5,5"]
    return Case("", {}, fsq_oracle([8, 8, 8, 5, 5, 5]), 6, "fsq", "finite scalar quantization", flags)


def lfq_oracle(weights: np.ndarray) -> Oracle:
    def oracle(z):
        return ((z > 0) * weights).sum(axis=1), np.where(z > 0, 1.0, -1.0)

    return oracle


@case
def lfq_by_its_mask() -> Case:
    mask = 2 ** np.arange(9, -1, -1)
    return Case(".pt", {"lfq.mask": mask}, lfq_oracle(mask), 10, "lfq", "lookup-free quantization under lfq.")


@case
def lfq_projected() -> Case:
    mask = 2 ** np.arange(9, -1, -1)
    arrays = {"mask": mask, **linear("project_in", C, 10), **linear("project_out", 10, C)}
    return Case(".pt", arrays, projected(arrays, "", lfq_oracle(mask)), C, "lfq", "lookup-free quantization")


@case
def open_magvit2() -> Case:
    flags = ["--kind", "lfq", "--bits", "18", "--bit-order", "little"]
    arrays = {"encoder.conv_in.weight": normal(2, 2), "decoder.conv_out.bias": normal(2)}
    return Case(".ckpt", arrays, lfq_oracle(2 ** np.arange(18)), 18, "lfq", "lookup-free quantization", flags,
                "state_dict", list(arrays), ("--bits", "--kind lfq needs --bits"))  # fmt: skip


@case
def open_magvit2_by_its_mask() -> Case:
    arrays = {"quantize.mask": 2 ** np.arange(18), "encoder.conv_in.weight": normal(2, 2)}
    return Case(
        ".ckpt", arrays, lfq_oracle(2 ** np.arange(18)), 18, "lfq", "quantization under quantize.", [], "state_dict"
    )


@case
def lfq_without_a_file() -> Case:
    flags = ["--kind", "lfq", "--bits", "18"]
    return Case("", {}, lfq_oracle(2 ** np.arange(17, -1, -1)), 18, "lfq", "lookup-free quantization", flags)


@case
def bare_residual() -> Case:
    codes = normal(4, K, D)
    return Case(".npz", {"codebooks": codes, "other": normal(2)}, lambda z: chain(z, [plain(c) for c in codes]), D,
                "rvq", "arrays of codes", ["--key", "codebooks", "--kind", "rvq", "--metric", "l2"], "", ["other"],
                METRIC)  # fmt: skip


@case
def bare_stages() -> Case:
    codes = normal(3, K, D)
    arrays = {f"ceps{i}": codes[2 - i] for i in range(3)}
    flags = ["--key", "ceps2", "--key", "ceps1", "--key", "ceps0", "--metric", "l2"]
    return Case(".npz", arrays, lambda z: chain(z, [plain(c) for c in codes]), D, "rvq", "arrays of codes", flags)


@case
def bare_cosine() -> Case:
    codes = normal(K, D)
    flags = ["--metric", "cosine", "--decode", "raw"]
    return Case(".npy", {"": codes}, table(codes, by_cosine), D, "cosine", "an array of codes", flags, "", [],
                ("--decode", "pass --decode normalized"))  # fmt: skip


@case
def bare_cosine_normalized() -> Case:
    codes = normal(K, D)
    flags = ["--metric", "cosine", "--decode", "normalized"]
    return Case(".npy", {"": codes}, table(codes, by_cosine, unit(codes)), D, "cosine", "an array of codes", flags)


# Of DAC, Mimi and SimVQ, as imported when this test was written.
DIGESTS = [
    "4b20bc8970fe84c283f35947b9b302027e04df17fbc523be610bef0ce220c7e3",
    "c1f6b4e6f4c94f480ff6fbef50763df3588db115a8e1b4d48bdf113bb9dbca60",
    "2661d5f57e5fc3fa9cab8c3d5c42a9a6de2732b659c09f4194dc81fec5145e09",
]


def write(folder: Path, made: Case) -> Path | None:
    path = folder / f"model{made.suffix}"
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in made.arrays.items()}
    match made.suffix:
        case "":
            return None
        case ".safetensors":
            save_file(tensors, path)
        case ".npz":
            np.savez(path, **made.arrays)
        case ".npy":
            np.save(path, made.arrays[""])
        case _:
            torch.save({made.wrap: tensors, "epoch": 3} if made.wrap else tensors, path)
    return path


def run(capsys, *args: object) -> tuple[int, str, str]:
    status = cli.main([str(arg) for arg in args])
    return status, *capsys.readouterr()


@pytest.fixture(params=CASES)
def made(request: pytest.FixtureRequest) -> Case:
    RNG.bit_generator.state = np.random.default_rng(5).bit_generator.state
    return CASES[request.param]()


@pytest.fixture
def imported(made: Case, tmp_path: Path, capsys) -> tuple[Path, str]:
    """The codebook file, and what its import printed."""
    source, out = write(tmp_path, made), tmp_path / "out.safetensors"
    status, text, err = run(capsys, "import", *([source] if source else []), "-o", out, *made.flags)
    assert (status, err) == (0, "")
    return out, text


def test_what_the_import_says(made, imported):
    out, text = imported
    lines = text.splitlines()
    assert lines[0].startswith("found  ")
    assert made.found in lines[0]
    taken = [line.split("  ")[1] for line in lines if line.startswith("took  ")]
    left = [line.removeprefix("left  ") for line in lines if line.startswith("left  ")]
    if len(made.arrays) > 1:
        assert sorted([*taken, *left]) == sorted(made.arrays)
        assert set(made.left) <= set(left)
    assert lines[-1].startswith(f"wrote {out}: {made.kind}, ")
    codebook = load_codebook(out)
    assert lines[-1].endswith(codebook.digest)
    assert codebook.provenance["tensors"] == taken or made.suffix == ".npy"


def test_indices_and_latents_are_the_formula_s(made, imported):
    z = normal(N, made.channels)
    indices, decoded = made.oracle(z.astype(np.float64))
    with Tokenizer.load(imported[0], device="cpu") as tokenizer:
        assert tokenizer.info.kind == made.kind
        assert tokenizer.info.output_dim == decoded.shape[1]
        ours = tokenizer.encode(z)
        assert np.array_equal(ours, indices)
        assert np.abs(tokenizer.decode(ours) - decoded).max() <= 1e-6 * max(1.0, np.abs(decoded).max())


def test_what_the_keys_do_not_tell_is_asked_for(made, tmp_path, capsys):
    if made.asks is None:
        return
    flag, question = made.asks
    at = made.flags.index(flag)
    flags = made.flags[:at] + made.flags[at + 2 :]
    out = tmp_path / "out.safetensors"
    status, text, err = run(capsys, "import", write(tmp_path, made), "-o", out, *flags)
    assert (status, text) == (1, "")
    assert question in err
    assert err.count("\n") == 1
    assert not out.exists()


def test_an_imported_file_is_inspected_and_keeps_its_digest(made, imported, tmp_path, capsys):
    out, text = imported
    status, report, _ = run(capsys, "inspect", out, "--json")
    assert status == 0
    report = json.loads(report)
    assert report["kind"] == made.kind
    assert report["digest"] in text
    again, sources = tmp_path / "again.safetensors", list(tmp_path.glob("model*"))
    assert run(capsys, "import", *sources, "-o", again, *made.flags)[0] == 0
    assert again.read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    "pairs",
    [
        {"quantizer.vq.layers.0._codebook.embed": "quantizer.layers.0.codebook.embed"},
        {
            f"quantizer.rvq_{old}.{inner}": f"quantizer.{new}_residual_vector_quantizer.{outer}"
            for old, new in (("first", "semantic"), ("rest", "acoustic"))
            for inner, outer in (
                ("vq.layers.0._codebook.embedding_sum", "layers.0.codebook.embed_sum"),
                ("vq.layers.0._codebook.cluster_usage", "layers.0.codebook.cluster_usage"),
                ("input_proj.weight", "input_proj.weight"),
                ("output_proj.weight", "output_proj.weight"),
            )
        },
    ],
    ids=["encodec", "mimi"],
)
def test_one_model_in_two_namings_has_one_digest(tmp_path, capsys, pairs):
    arrays = {}
    for name in pairs:
        shape = (D, C, 1) if "input_proj" in name else (C, D, 1) if "output_proj" in name else (K, D)
        arrays[name] = torch.from_numpy(np.abs(normal(*((K,) if "usage" in name else shape))) + 0.1)
    digests = set()
    for number, state in enumerate((arrays, {pairs[name]: array for name, array in arrays.items()})):
        source, out = tmp_path / f"{number}.safetensors", tmp_path / f"{number}.out.safetensors"
        save_file(state, source)
        assert run(capsys, "import", source, "-o", out)[0] == 0
        digests.add(load_codebook(out).digest)
    assert len(digests) == 1


def counted(*shape: int) -> np.ndarray:
    """Return numbers that everybody can write down, whatever becomes of numpy's generators."""
    return (((np.arange(np.prod(shape)) * 7919 + 13) % 997 - 498) / 64).astype(np.float32).reshape(shape)


def test_a_digest_stays_what_it_is(tmp_path, capsys, monkeypatch):
    # Of what is computed on the way in: weight norm and the quotient of averages must not change by a bit.
    monkeypatch.setitem(globals(), "normal", counted)
    digests = []
    for make in (dac, mimi, simvq):
        folder = tmp_path / make.__name__
        folder.mkdir()
        source, out = write(folder, make()), folder / "out.safetensors"
        assert run(capsys, "import", source, "-o", out)[0] == 0
        digests.append(load_codebook(out).digest)
    assert digests == DIGESTS


def test_imported_files_are_served(tmp_path, capsys, serving):
    tokenizers: list[Any] = []
    for number, (name, make) in enumerate(CASES.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        source, out = write(folder, made := make()), tmp_path / f"{name}.safetensors"
        assert run(capsys, "import", *([source] if source else []), "-o", out, *made.flags)[0] == 0
        tokenizers.append(Tokenizer.load(out, device="cpu"))
    with Client(serving(*tokenizers).target) as client:
        for tokenizer in tokenizers:
            z = normal(8, tokenizer.info.input_dim)
            indices = client.encode(z, codebook=tokenizer.name, digest=tokenizer.digest)
            assert np.array_equal(indices, tokenizer.encode(z))
            latents = client.decode(indices, codebook=tokenizer.name)
            assert np.array_equal(latents, tokenizer.decode(indices))
