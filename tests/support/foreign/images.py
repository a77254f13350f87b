"""Tokenizers of images and video."""

from __future__ import annotations

import numpy as np

from support.foreign.case import METRIC, C, Case, D, K, Oracle, affine, by_cosine, by_product, case, normal, table, unit


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
