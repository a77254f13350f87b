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
