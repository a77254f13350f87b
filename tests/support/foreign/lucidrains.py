"""vector-quantize-pytorch."""

from __future__ import annotations

import numpy as np

from support.foreign.case import (
    C,
    Case,
    D,
    K,
    affine,
    by_cosine,
    case,
    chain,
    linear,
    normal,
    plain,
    projected,
    table,
    unit,
)

LUCIDRAINS = ("--metric", "pass --metric l2 or --metric cosine")


def lucidrains_codebook(at: str, codes: np.ndarray) -> dict[str, np.ndarray]:
    heads = codes if codes.ndim == 3 else codes[None]
    return {
        f"{at}_codebook.initted": np.array(True),
        f"{at}_codebook.cluster_size": normal(*heads.shape[:2]) ** 2,
        f"{at}_codebook.embed_avg": normal(*heads.shape),
        f"{at}_codebook.embed": heads,
    }


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
