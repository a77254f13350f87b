"""Mutants of every family's example: each is imported right or rejected, none gives other tokens in silence.

The truth about a mutant comes from what the mutation does to its example, whose formula is written down in
test_families.py, in float64:

- A wrapper, a prefix, other metadata or a wider type change no number: the tokens are the example's.
- Codes that are replaced in place are replaced in the formula too, which reads the same memory.
- Stages that are gone from the end, or added there, change no token of the other stages.
- Codes that are gone from the end change only the tokens that named one of them.
- A gap in the stages, and an array more in the quantizer's module, can only be rejected.
- After any other mutation the import is rejected, or the tokens are the example's: what was mutated is not read.

A codebook that takes latents of another width is not silent: it rejects the model's latents. What leaves no trace in a
file, because a file without it is as good, is listed in `NO_TRACE`.
"""

from __future__ import annotations

import argparse
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tools.importing.test_families import CASES, RNG, Case
from vqserve.errors import ForeignCheckpointError
from vqserve_tools.flags import add_flags, from_flags
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.importer import import_checkpoint

N = 100
# An array that its family has or has not: SimVQ's transform is made without a bias by default.
NO_TRACE = {"simvq_with_a_bias": "q.code_transform.bias"}
Arrays = dict[str, np.ndarray]
Draw = np.random.Generator

_PARSER = argparse.ArgumentParser()
add_flags(_PARSER, Options)


@dataclass
class Mutant:
    """A mutated example.

    Attributes:
        case: the example with mutated arrays.
        must_import: whether a rejection is wrong.
        must_reject: whether any import is wrong.
        stages: whether stages may be gone from the end, or added there.
        codes: number of codes that are left of each codebook; None: all.
        metadata: whether the file gets other metadata.
    """

    case: Case
    must_import: bool = False
    must_reject: bool = False
    stages: bool = False
    codes: int | None = None
    metadata: bool = False


Mutation = Callable[[Case, Draw], Mutant | None]
MUTATIONS: dict[str, Mutation] = {}


def mutation(mutate: Mutation) -> Mutation:
    MUTATIONS[mutate.__name__] = mutate
    return mutate


def with_names(case: Case, rename: Callable[[str], str]) -> Case:
    return replace(case, arrays={rename(name): array for name, array in case.arrays.items()})


def without(case: Case, gone: Sequence[str]) -> Case:
    return replace(case, arrays={name: array for name, array in case.arrays.items() if name not in set(gone)})


def is_table(case: Case, name: str) -> bool:
    """Return whether an array is a table of codes that its example takes: of two or three axes, by its name."""
    last = name.removesuffix(".weight").rpartition(".")[2]
    named = {"", "embedding", "embed", "codebook", "codebooks", "frozen_codebook", "quantizeembeddingweight"}
    names = named | {"ceps0", "ceps1", "ceps2", "embedding_sum", "embed_sum"}
    return last in names and case.arrays[name].ndim in (2, 3) and name not in case.left


def tables(case: Case) -> list[str]:
    prefix = case.flags[case.flags.index("--prefix") + 1] if "--prefix" in case.flags else ""
    return [name for name in case.arrays if name.startswith(prefix) and is_table(case, name)]


def stages(case: Case) -> list[tuple[str, int]]:
    """Return the numbered modules that hold tables, and how many there are: ("quantizer.vq.layers.", 4)."""
    numbers: dict[str, set[int]] = {}
    for name in tables(case):
        match = re.fullmatch(r"(.*\b[a-z]+\.)(\d+)\..*", name)
        if match:
            numbers.setdefault(match[1], set()).add(int(match[2]))
    return [(module, max(found) + 1) for module, found in numbers.items()]


def pick(draw: Draw, among: Sequence) -> object:
    return among[int(draw.integers(len(among)))]


@mutation
def a_wrapper_around_all_names(case: Case, draw: Draw) -> Mutant | None:
    if {"--key", "--prefix"} & set(case.flags) or "" in case.arrays:
        return None
    wrapper = pick(draw, ["module.", "_orig_mod.", "module._orig_mod.", "_forward_module."])
    return Mutant(with_names(case, lambda name: f"{wrapper}{name}"), must_import=True)


@mutation
def a_prefix_before_all_names(case: Case, draw: Draw) -> Mutant | None:
    prefix = pick(draw, ["net.", "model.tokenizer.", "vq_model.", "vqvae.module.", "ema.", "encoder."])
    return Mutant(with_names(case, lambda name: f"{prefix}{name}"))


@mutation
def another_name_of_the_quantizer(case: Case, draw: Draw) -> Mutant | None:
    modules = sorted({name.partition(".")[0] for name in case.arrays if "." in name})
    if not modules:
        return None
    old, new = pick(draw, modules), pick(draw, ["vq", "quantizer", "tokenizer", "bottleneck", "regularization"])
    return Mutant(with_names(case, lambda name: re.sub(rf"^{old}\.", f"{new}.", name)))


@mutation
def other_metadata(case: Case, draw: Draw) -> Mutant | None:
    if case.suffix == ".safetensors":
        return Mutant(case, must_import=True, metadata=True)
    if case.suffix in {".npy", ".npz"}:
        return None
    return Mutant(replace(case, wrap=str(pick(draw, ["state_dict", "model"]))), must_import=True)


@mutation
def float64(case: Case, draw: Draw) -> Mutant | None:
    wide = {name: array.astype(np.float64) if array.dtype.kind == "f" else array for name, array in case.arrays.items()}
    return Mutant(replace(case, arrays=wide), must_import=True)


@mutation
def a_key_renamed(case: Case, draw: Draw) -> Mutant | None:
    old = str(pick(draw, list(case.arrays)))
    components = old.split(".")
    at = int(draw.integers(len(components)))
    word = components[at]
    number = str(int(word) + 5) if word.isdecimal() else ""
    components[at] = number or str(pick(draw, [f"{word}_old", f"{word}x", word[:-1] or "x"]))
    new = ".".join(components)
    return None if new in case.arrays else Mutant(with_names(case, lambda name: new if name == old else name))


@mutation
def a_key_gone(case: Case, draw: Draw) -> Mutant | None:
    return Mutant(without(case, [str(pick(draw, list(case.arrays)))]), stages=True)


@mutation
def half_of_the_keys_gone(case: Case, draw: Draw) -> Mutant | None:
    names = [name for name in case.arrays if draw.random() < 0.5]
    return Mutant(without(case, names), stages=True) if len(names) < len(case.arrays) else None


@mutation
def the_second_half_of_the_file_gone(case: Case, draw: Draw) -> Mutant | None:
    names = list(case.arrays)
    return Mutant(without(case, names[-(len(names) // 2) or len(names) :]), stages=True) if len(names) > 1 else None


@mutation
def a_stage_gone_in_the_middle(case: Case, draw: Draw) -> Mutant | None:
    found = [(module, count) for module, count in stages(case) if count > 1]
    if not found:
        return None
    module, count = pick(draw, found)
    gone = f"{module}{int(draw.integers(count - 1))}."
    return Mutant(without(case, [name for name in case.arrays if name.startswith(gone)]), must_reject=True)


@mutation
def the_last_stage_gone(case: Case, draw: Draw) -> Mutant | None:
    found = [(module, count) for module, count in stages(case) if count > 1]
    if not found:
        return None
    module, count = pick(draw, found)
    gone = f"{module}{count - 1}."
    return Mutant(without(case, [name for name in case.arrays if name.startswith(gone)]), stages=True)


@mutation
def a_stage_more(case: Case, draw: Draw) -> Mutant | None:
    found = stages(case)
    if not found:
        return None
    module, count = found[-1]
    gap = int(draw.integers(2))
    more = {
        name.replace(f"{module}{count - 1}.", f"{module}{count + gap}.", 1): draw.permutation(array)
        if array.ndim
        else array
        for name, array in case.arrays.items()
        if name.startswith(f"{module}{count - 1}.")
    }
    return Mutant(replace(case, arrays=case.arrays | more), stages=not gap, must_reject=bool(gap))


@mutation
def an_array_more(case: Case, draw: Draw) -> Mutant | None:
    anchors = tables(case) or [name for name in case.arrays if name not in case.left and "coder" not in name]
    if "" in case.arrays or not anchors:
        return None
    components = str(pick(draw, anchors)).removesuffix(".weight").split(".")[:-1]
    around = [
        components[: i + 1] for i, name in enumerate(components) if re.search("quant|vq(?!model)|regularization", name)
    ]
    at = "".join(f"{name}." for name in pick(draw, [*around, components]))
    # No family has these, or has one without its counterpart.
    parts = ["project_in", "in_proj", "input_proj", "pre_project", "project_mid", "code_transform", "quant_resi.0"]
    in_model = any(name.startswith(at) and re.search("coder|conv", name) for name in case.arrays)
    if "--key" not in case.flags and not in_model:
        parts += ["norm", "affine"]
    part = str(pick(draw, parts))
    new = {f"{at}{part}.weight": draw.standard_normal((case.channels,) * 2).astype(np.float32)}
    if draw.random() < 0.5:
        new[f"{at}{part}.bias"] = draw.standard_normal(case.channels).astype(np.float32)
    if set(new) & set(case.arrays):
        return None
    return Mutant(replace(case, arrays=case.arrays | new), must_reject=True)


@mutation
def a_codebook_transposed(case: Case, draw: Draw) -> Mutant | None:
    found = tables(case)
    if not found:
        return None
    name = str(pick(draw, found))
    codes = case.arrays[name]
    if codes.shape[-1] == codes.shape[-2]:
        # Nothing in such a file says it.
        return None
    return Mutant(replace(case, arrays=case.arrays | {name: np.ascontiguousarray(codes.swapaxes(-1, -2))}))


@mutation
def a_codebook_of_fewer_codes(case: Case, draw: Draw) -> Mutant | None:
    found = tables(case)
    if not found:
        return None
    name = str(pick(draw, found))
    codes = case.arrays[name]
    left = codes.shape[-2] - int(draw.integers(1, 4))
    return Mutant(replace(case, arrays=case.arrays | {name: codes[..., :left, :].copy()}), codes=left)


@mutation
def a_narrower_codebook(case: Case, draw: Draw) -> Mutant | None:
    found = tables(case)
    if not found:
        return None
    name = str(pick(draw, found))
    return Mutant(replace(case, arrays=case.arrays | {name: case.arrays[name][..., :-1].copy()}))


@mutation
def a_codebook_twice(case: Case, draw: Draw) -> Mutant | None:
    found = [name for name in tables(case) if not name.endswith(("_sum", "frozen_codebook"))]
    pairs = [(a, b) for a in found for b in found if a != b and case.arrays[a].shape == case.arrays[b].shape]
    if not pairs:
        return None
    first, second = pick(draw, pairs)
    case.arrays[second][...] = case.arrays[first]
    return Mutant(case)


def write(folder: Path, mutant: Mutant) -> Path:
    case, path = mutant.case, folder / f"m{mutant.case.suffix}"
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in case.arrays.items()}
    match case.suffix:
        case ".safetensors":
            save_file(tensors, path, {"format": "pt", "step": "3"} if mutant.metadata else None)
        case ".npz":
            np.savez(path, **case.arrays)
        case ".npy":
            np.save(path, case.arrays[""])
        case _:
            torch.save({case.wrap: tensors, "epoch": 3, "lr": [0.1]} if case.wrap else tensors, path)
    return path


def verdict(folder: Path, mutant: Mutant, draw: Draw) -> str:
    """Return what became of a mutant: "rejected", "other width", "right", or "WRONG"."""
    case = mutant.case
    try:
        result = import_checkpoint(write(folder, mutant), from_flags(Options, _PARSER.parse_args(case.flags)))
    except ForeignCheckpointError:
        return "WRONG" if mutant.must_import else "rejected"
    quantizer = result.quantizer
    if mutant.must_reject:
        return "WRONG"
    if quantizer.input_dim != case.channels:
        return "WRONG" if mutant.must_import else "other width"
    z = draw.standard_normal((N, case.channels)).astype(np.float32)
    expected = case.oracle(z.astype(np.float64))[0].reshape(N, -1)
    ours = quantizer.encode(torch.from_numpy(z)).numpy().reshape(N, -1)
    rows = np.ones(N, bool) if mutant.codes is None else (expected < mutant.codes).all(axis=1)
    columns = min(ours.shape[1], expected.shape[1])
    if not mutant.stages and ours.shape != expected.shape:
        return "WRONG"
    return "right" if np.array_equal(ours[rows, :columns], expected[rows, :columns]) else "WRONG"


def study(folder: Path, name: str, seed: int = 0) -> dict[str, str]:
    """Return the verdicts on the mutants that one mutation makes of all examples."""
    found = {}
    for example, make in CASES.items():
        draw = np.random.default_rng(zlib.crc32(f"{name} {example} {seed}".encode()))
        RNG.bit_generator.state = np.random.default_rng(5).bit_generator.state
        case = make()
        renames = name in {"a_prefix_before_all_names", "a_key_renamed", "a_key_gone", "half_of_the_keys_gone"}
        unnamed = "" in case.arrays
        mutant = MUTATIONS[name](case, draw) if case.arrays and not (unnamed and renames) else None
        if mutant is not None:
            what = verdict(folder, mutant, draw)
            no_trace = example in NO_TRACE and NO_TRACE[example] not in mutant.case.arrays
            found[example] = "no trace" if what == "WRONG" and no_trace else what
    return found


@pytest.mark.parametrize("name", MUTATIONS)
def test_no_mutant_is_imported_wrong(tmp_path, name):
    found = study(tmp_path, name)
    assert [example for example, what in found.items() if what == "WRONG"] == []
    assert len(found) >= 8, Counter(found.values())


def test_there_are_three_hundred_mutants_and_half_of_them_are_imported(tmp_path):
    verdicts = Counter(what for name in list(MUTATIONS)[::3] for what in study(tmp_path, name, 1).values())
    assert verdicts.total() >= 200
    assert verdicts["right"] >= 100
    assert verdicts["rejected"] >= 40
