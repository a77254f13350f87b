"""A version's residual FSQ beside ours: which indices differ, and how near to a boundary its residuals are there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from libraries.near_ties import NoNearTie
from vqserve_server.quantizers import ResidualFiniteScalarQuantizer, freeze
from vqserve_server.quantizers.inference.residual_scalar import FrozenResidualScalar, FrozenScalarPart
from vqserve_server.quantizers.projections import project

# How far a residual may be from a boundary where the library's digit is not ours.
NEAR = 1e-5


@dataclass(frozen=True)
class Case:
    """One case of a golden file.

    Attributes:
        quantizer: ours, with the library's projections.
        latents: (b, s, C).
        indices: the library's, (b, s, n_q) in our order.
        decoded: what it decodes them to.
    """

    quantizer: ResidualFiniteScalarQuantizer
    latents: Tensor
    indices: Tensor
    decoded: Tensor


@dataclass(frozen=True)
class Comparison:
    """What differed.

    Attributes:
        tokens: how many there were.
        differing: tokens with an index that is not the library's.
        distance: the largest distance of a residual to the boundary between our digit and the library's.
        decoded: the largest difference between what we and the library decode its indices to.
    """

    tokens: int
    differing: int
    distance: float
    decoded: float


def load(path: Path) -> tuple[str, dict[str, Case]]:
    """Return a file's library, and its cases by name."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    meta = json.loads(bytes(arrays["meta"]))
    cases = {}
    for case, given in meta["cases"].items():
        of_case = {
            name.removeprefix(f"{case}."): torch.from_numpy(array)
            for name, array in arrays.items()
            if name.startswith(f"{case}.")
        }
        quantizer = _quantizer(meta["bound"], given)
        quantizer.load_state_dict({_our_name(name): of_case[name] for name in of_case if name.startswith("state.")})
        cases[case] = Case(quantizer, of_case["latents"], of_case["indices"].long(), of_case["decoded"])
    return meta["library"], cases


def _quantizer(bound: str, given: dict[str, Any]) -> ResidualFiniteScalarQuantizer:
    groups = given.get("groups", 1)
    is_symmetric = given.get("preserve_symmetry", False) or not given.get("bound_hard_clamp", True)
    width = None if given["dim"] == groups * len(given["levels"]) else given["dim"]
    quantizer = ResidualFiniteScalarQuantizer(
        given["levels"],
        given["num_quantizers"] * groups,
        "symmetric" if is_symmetric else bound,
        "levels" if bound == "soft_clamp" else "levels_minus_one",
        groups=groups,
        input_dim=width,
        output_dim=width,
    )
    quantizer.layout = "channels_last"
    return quantizer.eval()


def _our_name(name: str) -> str:
    inner = name.removeprefix("state.")
    group, rest = inner.removeprefix("rvqs.").split(".", 1) if inner.startswith("rvqs.") else ("0", inner)
    return f"parts.{group}.{rest.replace('project_', 'proj_')}"


def compare(case: Case) -> Comparison:
    """Follow the library's indices, and compare each with ours for the residual that its earlier ones left.

    Raises:
        NoNearTie: a digit differs, and the residual is further than `NEAR` from the boundary between the two.
    """
    quantizer = case.quantizer
    ours, rows = quantizer.encode(case.latents).flatten(0, 1), case.latents.flatten(0, 1)
    theirs = case.indices.flatten(0, 1)
    differs = (ours != theirs).any(dim=1)
    frozen = freeze(quantizer, device="cpu")
    assert isinstance(frozen, FrozenResidualScalar)
    distance = max(_largest_distance(part, rows[differs], theirs[differs]) for part in frozen._parts)
    decoded = (quantizer.decode(case.indices) - case.decoded).abs().max()
    return Comparison(len(rows), int(differs.sum()), distance, float(decoded))


def _largest_distance(part: FrozenScalarPart, rows: Tensor, theirs: Tensor) -> float:
    residual = project(rows[:, part.part.start : part.part.stop].contiguous(), part.projection)
    if part.first_bound is not None:
        residual = part.first_bound(residual)
    largest = 0.0
    for number, (stage, place) in enumerate(zip(part.stages, part.part.places, strict=True)):
        our = stage.digits(residual)
        their = theirs[:, place] // stage._weights[:, None] % stage._levels[:, None]
        for channel, row in torch.nonzero(our != their).tolist():
            low, high = sorted((int(our[channel, row]), int(their[channel, row])))
            between = stage._boundaries[channel, low:high]
            found = float((between - residual[row, channel].double()).abs().max())
            if not found < NEAR:
                raise NoNearTie(f"stage {number}, channel {channel}: {found:.3g} from the digit's boundary")
            largest = max(largest, found)
        residual = residual - stage.values_of(their)
    return largest
