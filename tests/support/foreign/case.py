"""A small checkpoint of a foreign family, what is said of it, and the formula of its quantizer in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from support.brute_force import nearest

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


METRIC = ("--metric", "pass --metric l2 or --metric cosine or --metric dot")


def table(codes: np.ndarray, search=nearest, rows: np.ndarray | None = None) -> Oracle:
    decoded = codes.astype(np.float64) if rows is None else rows

    def oracle(z):
        indices = search(z, codes)
        return indices, decoded[indices]

    return oracle


def linear(at: str, inputs: int, outputs: int) -> dict[str, np.ndarray]:
    return {f"{at}.weight": normal(outputs, inputs), f"{at}.bias": normal(outputs)}


def projected(arrays: dict[str, np.ndarray], at: str, inner: Oracle) -> Oracle:
    def oracle(z):
        indices, decoded = inner(affine(z, arrays[f"{at}project_in.weight"], arrays[f"{at}project_in.bias"]))
        return indices, affine(decoded, arrays[f"{at}project_out.weight"], arrays[f"{at}project_out.bias"])

    return oracle


def layer(
    arrays: dict[str, np.ndarray], at: str, inputs: int, outputs: int, naming: str
) -> Callable[[np.ndarray], np.ndarray]:
    """Add a 1x1 convolution, plain or with the old or new names of weight norm, to the arrays; return its formula."""
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
