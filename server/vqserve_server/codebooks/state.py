"""A codebook as plain data: what a file holds and what a quantizer is made from, checked against itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vqserve_server.codebooks.arguments import MAX_VOCABULARY, served_arguments
from vqserve_server.codebooks.digest import digest
from vqserve_server.codebooks.shapes import DIRECTION, NORM, expected_shapes
from vqserve_server.errors import InvalidOption
from vqserve_server.validation import first_non_finite

# torch named the pair differently before it had parametrizations.
LEGACY_NAMES: Mapping[str, str] = {"embedding.weight_g": NORM, "embedding.weight_v": DIRECTION}
# What encode and decode never read.
_TRAINING_ONLY = frozenset({"embedding.cluster_size", "embedding.embed_avg"})
USED = "used"


class StateError(ValueError):
    """The tensors do not belong to the arguments, or cannot be served."""


@dataclass(frozen=True)
class CodebookState:
    """Kind, constructor arguments and state dict of a quantizer, as numpy arrays under canonical names."""

    kind: str
    arguments: Mapping[str, object]
    tensors: Mapping[str, npt.NDArray[Any]]

    def digest(self) -> str:
        """Return the digest: equal exactly where encode and decode read the same."""
        served = {name: array for name, array in self.tensors.items() if name not in _TRAINING_ONLY}
        return digest(self.kind, served_arguments(self.kind, self.arguments, remapped=USED in served), served)


def canonical_names(names: set[str]) -> dict[str, str]:
    """Return each name's canonical one: the legacy names of weight norm become torch's present ones.

    Raises:
        StateError: a tensor is there under both names.
    """
    for legacy, current in LEGACY_NAMES.items():
        if legacy in names and current in names:
            raise StateError(f"it has both {legacy!r} and {current!r}, two names of one tensor")
    return {name: LEGACY_NAMES.get(name, name) for name in names}


def check_claims(kind: str, arguments: Mapping[str, Any], claims: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Check names, element types and shapes of tensors that need not be in memory yet.

    Args:
        kind: the quantizer's kind.
        arguments: as `check_arguments` returns them.
        claims: safetensors' dtype name and shape of every tensor, by canonical name.

    Raises:
        StateError: the arguments contradict each other, or a tensor is missing, extra, or of another shape or element
            type than it should be.
    """
    try:
        expected = expected_shapes(kind, arguments)
    except InvalidOption as error:
        raise StateError(f"its arguments do not fit together: {error}") from None
    missing = sorted(set(expected) - set(claims))
    if missing:
        raise StateError(f"tensor {missing[0]!r} is missing")
    extra = sorted(set(claims) - set(expected) - ({USED} if "unknown_index" in arguments else set()))
    if extra:
        raise StateError(f"tensor {extra[0]!r} does not belong to kind {kind!r} with these arguments")
    floats = {name: dtype for name, (dtype, _) in claims.items() if name != USED}
    for name, dtype in sorted(floats.items()):
        if dtype in {"F16", "BF16"}:
            raise StateError(f"tensor {name!r} is {dtype}: weights are kept in F32 (`vqserved import` widens them)")
        if dtype not in {"F32", "F64"}:
            raise StateError(f"tensor {name!r} is {dtype}, not F32 or F64")
    if len(set(floats.values())) > 1:
        raise StateError("some tensors are F32 and some F64: all must be of one type")
    for name, shape in expected.items():
        if claims[name][1] != shape:
            raise StateError(f"tensor {name!r} has shape {list(claims[name][1])}, the arguments make it {list(shape)}")
    if USED in claims:
        _check_used_claim(arguments, *claims[USED])


def _check_used_claim(arguments: Mapping[str, Any], dtype: str, shape: tuple[int, ...]) -> None:
    if dtype != "I64":
        raise StateError(f"tensor {USED!r} is {dtype}, not I64")
    if len(shape) != 1 or shape[0] < 1:
        raise StateError(f"tensor {USED!r} has shape {list(shape)}: it must have one axis and not be empty")
    if shape[0] + (arguments["unknown_index"] == "extra") > MAX_VOCABULARY:
        raise StateError(f"tensor {USED!r} has {shape[0]} entries, more than an index can count")


def check_values(state: CodebookState) -> None:
    """Check the values of tensors whose names, types and shapes are right.

    Raises:
        StateError: names the first tensor and position that cannot be served.
    """
    for name, array in sorted(state.tensors.items()):
        if name == USED:
            continue
        position = first_non_finite(array)
        if position is not None:
            raise StateError(f"{name}{list(position)} is {float(array[position])}")
    if DIRECTION in state.tensors:
        lengths = np.abs(state.tensors[DIRECTION]).max(axis=0)
        if not lengths.all():
            raise StateError(f"column {int(lengths.argmin())} of {DIRECTION} is zero and has no direction")
        # The weight is rounded to float32, and no entry of it is greater than its column's norm.
        if np.abs(state.tensors[NORM]).max() > np.finfo(np.float32).max:
            raise StateError(f"{NORM} holds a norm beyond float32's range")
    used = state.tensors.get(USED)
    if used is not None:
        codes = num_codes(state.arguments)
        outside = (used < 0) | (used >= codes)
        if outside.any():
            first = int(outside.argmax())
            raise StateError(f"{USED}[{first}] is {int(used[first])}, not in [0, {codes})")


def num_codes(arguments: Mapping[str, Any]) -> int:
    """Return K of a kind that can have a remap, whatever the kind calls it."""
    return int(next(arguments[name] for name in ("n_e", "n_embed", "n_codes") if name in arguments))
