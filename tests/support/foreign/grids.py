"""Quantizers without codes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from support.foreign.case import C, Case, Oracle, case, linear, normal, projected


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


def fsq_bound(levels: np.ndarray):
    """Return the bound of vector-quantize-pytorch up to 1.25, before the rounding."""
    half = (levels - 1) * (1 + 1e-3) / 2
    offset = np.where(levels % 2 == 0, 0.5, 0.0)
    return lambda z: np.tanh(z + np.arctanh(offset / half)) * half - offset


def residual_fsq_oracle(levels: Sequence[int], stages: int, version: str) -> Oracle:
    """ResidualFSQ of three versions of vector-quantize-pytorch."""
    sizes = np.array(levels)
    bound, basis = fsq_bound(sizes), np.cumprod([1, *levels[:-1]])

    def oracle(z):
        if version == "1.17.8":
            z = bound(z)
        if version == "1.32.0":
            limit = 1 + 1 / (sizes - 1)
            z = np.tanh(z / limit) * limit
        indices, total = [], np.zeros_like(z)
        for stage in range(stages):
            if version == "1.32.0":
                scale = 1.0 / sizes**stage
                digits = np.floor((sizes - 1) * (np.clip(z / scale, -1, 1) + 1) / 2 + 0.5)
                values = (digits * 2 / (sizes - 1) - 1) * scale
            else:
                scale = 1.0 / (sizes - 1) ** stage
                rounded = np.round(bound(z / scale))
                digits, values = rounded + sizes // 2, rounded / (sizes // 2) * scale
            indices.append((digits * basis).sum(axis=1).astype(int))
            z, total = z - values, total + values
        return np.stack(indices, axis=1), total

    return oracle


def residual_fsq_case(version: str, flags: list[str]) -> Case:
    arrays = {**linear("rfsq.project_in", C, 4), **linear("rfsq.project_out", 4, C)}
    oracle = projected(arrays, "rfsq.", residual_fsq_oracle([8, 5, 5, 4], 3, version))
    flags = ["--kind", "residual_fsq", "--levels", "8,5,5,4", "--stages", "3", *flags]
    return Case(".pt", arrays, oracle, C, "residual_fsq", "residual finite scalar quantization", flags)


@case
def residual_fsq_1_17_8() -> Case:
    made = residual_fsq_case("1.17.8", ["--library-version", "1.17.8"])
    made.asks = ("--library-version", "versions of vector-quantize-pytorch give other tokens")
    return made


@case
def residual_fsq_1_20() -> Case:
    return residual_fsq_case("1.20.0", ["--library-version", "1.20"])


@case
def residual_fsq_1_32_0() -> Case:
    return residual_fsq_case("1.32.0", ["--bound", "soft_clamp", "--scales", "levels"])


@case
def residual_fsq_grouped() -> Case:
    arrays: dict[str, np.ndarray] = {}
    for group in range(2):
        arrays |= linear(f"rvqs.{group}.project_in", C, 3) | linear(f"rvqs.{group}.project_out", 3, C)

    def oracle(z):
        parts = []
        for group in range(2):
            inner = projected(arrays, f"rvqs.{group}.", residual_fsq_oracle([8, 5, 5], 2, "1.32.0"))
            parts.append(inner(z[:, C * group : C * (group + 1)]))
        # All groups' first stages, then all second ones.
        indices = np.stack([part[0] for part in parts], axis=2).reshape(len(z), -1)
        return indices, np.concatenate([part[1] for part in parts], axis=1)

    flags = ["--kind", "residual_fsq", "--levels", "8,5,5", "--stages", "2", "--library-version", "1.32.0"]
    return Case(".pt", arrays, oracle, 2 * C, "residual_fsq", "residual finite scalar quantization", flags)


def xcodec_2_case(at: str) -> Case:
    arrays = linear(f"{at}project_in", 2048, 8) | linear(f"{at}project_out", 8, 2048)
    # As of a trained model: latents that are not all beyond the outermost boundaries.
    arrays[f"{at}project_in.weight"] /= 40
    oracle = projected(arrays, at, residual_fsq_oracle([4] * 8, 1, "1.17.8"))
    arrays["decoder.embed.bias"] = np.zeros(2, np.float32)
    return Case(".safetensors", arrays, oracle, 2048, "residual_fsq", f"X-Codec 2 (or NeuCodec) under {at}", [], "",
                ["decoder.embed.bias"])  # fmt: skip


@case
def xcodec_2() -> Case:
    return xcodec_2_case("generator.quantizer.")


@case
def xcodec_2_transformers() -> Case:
    return xcodec_2_case("quantizer.")
