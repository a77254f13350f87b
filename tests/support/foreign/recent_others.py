"""Tokenizers of images, semantic ids of recommenders and the layouts that most people's own models have."""

from __future__ import annotations

import numpy as np

from support.foreign.case import (
    METRIC,
    Case,
    D,
    K,
    Oracle,
    by_cosine,
    by_product,
    case,
    chain,
    normal,
    plain,
    table,
    unit,
)


@case
def unitok() -> Case:
    codes = normal(3, K, D)
    arrays = {"quant_proj.weight": normal(3 * D, 2)}
    for i, group in enumerate(codes):
        at = f"quantizer.codebooks.{i}."
        arrays |= {f"{at}codebook.weight": group, f"{at}vocab_usage": normal(K) ** 2}

    def oracle(z):
        parts = [table(group, by_cosine, unit(group))(z[:, D * i : D * (i + 1)]) for i, group in enumerate(codes)]
        return np.stack([indices for indices, _ in parts], axis=1), np.concatenate([q for _, q in parts], axis=1)

    return Case(".pth", arrays, oracle, 3 * D, "rvq", "UniTok under quantizer.", [], "", ["quant_proj.weight"])


@case
def emu3_5() -> Case:
    codes = normal(K, D)
    arrays = {"quantize.embedding.weight": codes, "quant_conv.weight": normal(D, D, 1, 1)}
    return Case(".safetensors", arrays, table(codes, by_product), D, "dot", "under quantize.", ["--metric", "dot"], "",
                ["quant_conv.weight"], METRIC)  # fmt: skip


def bsq_oracle(bits: int) -> Oracle:
    def oracle(z):
        return ((z > 0) * 2 ** np.arange(bits - 1, -1, -1)).sum(axis=1), np.where(z > 0, 1.0, -1.0) / bits**0.5

    return oracle


@case
def bsq() -> Case:
    arrays = {
        "quantize.basis": 2 ** np.arange(17, -1, -1),
        "quantize.group_basis": 2 ** np.arange(8, -1, -1),
        "quant_embed.weight": normal(18, 2),
    }
    return Case(".pt", arrays, bsq_oracle(18), 18, "lfq", "binary spherical quantization under quantize.", [],
                "state_dict", ["quant_embed.weight"])  # fmt: skip


@case
def semantic_ids() -> Case:
    codes = normal(3, K, D)
    arrays = {f"rq.vq_layers.{i}.embedding.weight": stage for i, stage in enumerate(codes)}
    arrays["encoder.mlp_layers.0.weight"] = normal(2, 2)
    return Case(".pth", arrays, lambda z: chain(z, [plain(stage) for stage in codes]), D, "rvq", "RQ-VAE", [],
                "state_dict", ["encoder.mlp_layers.0.weight"])  # fmt: skip


@case
def semantic_ids_of_three_sizes() -> Case:
    codes = [normal(count, D) for count in (3 * K, K, 2 * K)]
    arrays = {f"rq.vq_layers.{i}.embedding.weight": stage for i, stage in enumerate(codes)}
    return Case(".pth", arrays, lambda z: chain(z, [plain(stage) for stage in codes]), D, "rvq", "RQ-VAE")


@case
def grid() -> Case:
    """Residual k-means of residuals that are scaled to length one."""
    codes = normal(3, K, D) / 2

    def oracle(z):
        indices, total = [], np.zeros_like(z)
        for stage in codes:
            found, decoded = plain(stage)(unit(z))
            indices.append(found)
            z, total = unit(z) - decoded, total + decoded
        return np.stack(indices, axis=1), total

    flags = ["--metric", "l2", "--normalize-residuals"]
    flags += [word for i in range(3) for word in ("--key", f"quantization_layer_list.{i}.centroids")]
    arrays = {f"quantization_layer_list.{i}.centroids": stage for i, stage in enumerate(codes)}
    return Case(".ckpt", arrays, oracle, D, "rvq", "arrays of codes", flags, "state_dict", [], METRIC)


@case
def vqvae() -> Case:
    codes = normal(K, D)
    arrays = {"_vq_vae._embedding.weight": codes, "_encoder._conv_1.bias": normal(2)}
    return Case(".pt", arrays, table(codes), D, "vq", "VQ-VAE under _vq_vae.", [], "", ["_encoder._conv_1.bias"])


@case
def vqvae_with_averages() -> Case:
    sums, counts = normal(K, D), normal(K) ** 2 + 0.5
    codes = sums / counts[:, None]
    at = "_vq_vae."
    arrays = {f"{at}_embedding.weight": codes, f"{at}_ema_w": sums, f"{at}_ema_cluster_size": counts}
    return Case(".pt", arrays, table(codes), D, "ema", "VQ-VAE under _vq_vae.")


@case
def vqvae_with_other_averages() -> Case:
    """Of a model that took other codes after the last update of its averages."""
    codes = normal(K, D)
    others = {"_ema_w": normal(K, D), "_ema_cluster_size": normal(K) ** 2 + 0.5}
    arrays = {"_embedding.weight": codes, **others}
    return Case(".pt", arrays, table(codes), D, "vq", "VQ-VAE", [], "", list(others))


@case
def vqvae_2() -> Case:
    """One of VQ-VAE-2's two quantizers: codes as columns, quotients by smoothed counts."""
    sums, counts = normal(D, K), normal(K) ** 2
    counts[3] = 1e-4
    smoothed = (counts + 1e-5) / (counts.sum() + K * 1e-5) * counts.sum()
    columns = (sums / smoothed).astype(np.float32)
    arrays: dict[str, np.ndarray] = {}
    for at, embed in (("quantize_t.", columns), ("quantize_b.", columns + 1)):
        arrays |= {f"{at}embed": embed, f"{at}embed_avg": sums, f"{at}cluster_size": counts}
    return Case(".pt", arrays, table(columns.T), D, "ema", "VQ-VAE-2 under quantize_t.", ["--prefix", "quantize_t."],
                "", [], ("--prefix", "choose one with --prefix quantize_b."))  # fmt: skip


@case
def vq_layer() -> Case:
    codes = normal(K, D)
    arrays = {"vq_layer.embedding.weight": codes, "encoder.0.bias": normal(2)}
    return Case(".pt", arrays, table(codes), D, "vq", "under vq_layer.", ["--metric", "l2"], "", ["encoder.0.bias"],
                METRIC)  # fmt: skip


@case
def codebook() -> Case:
    codes = normal(K, D)
    arrays = {"model.codebook.weight": codes, "model.encoder.0.bias": normal(2)}
    return Case(".pt", arrays, table(codes, by_product), D, "dot", "an array of codes under model.",
                ["--metric", "dot"], "state_dict", ["model.encoder.0.bias"], METRIC)  # fmt: skip


@case
def dictionary_of_columns() -> Case:
    codes = normal(D, K)
    arrays = {"vq.dictionary": codes, "vq.ema_cluster_size": normal(K) ** 2, "vq.ema_dw": normal(D, K)}
    return Case(".npz", arrays, table(codes.T), D, "vq", "an array of codes under vq.", ["--metric", "l2"], "",
                ["vq.ema_dw"], METRIC)  # fmt: skip
