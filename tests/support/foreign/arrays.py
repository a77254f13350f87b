"""Arrays that the user names."""

from __future__ import annotations

from support.foreign.case import METRIC, Case, D, K, by_cosine, case, chain, normal, plain, table, unit


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
