"""A codebook as plain data, between a file and a quantizer: checks that its parts agree, and computes its digest."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from vqserve.dtypes import BY_SAFETENSORS, LATENTS
from vqserve.errors import CodebookError, InvalidOption
from vqserve.safetensors_file import dtype_name
from vqserve.validation import LARGEST_VOCABULARY
from vqserve_server.codebooks.kinds import KINDS, kind_of
from vqserve_server.quantizers.arguments import ArgumentError, check_arguments, written_arguments
from vqserve_server.quantizers.declared import DIRECTION, NORM, USED, PlainCodebook, PlainKind
from vqserve_server.quantizers.plain_kinds import PLAIN_KINDS
from vqserve_server.validation import first_non_finite

if TYPE_CHECKING:
    from vqserve_server.quantizers import Quantizer

Claim = tuple[str, tuple[int, ...]]
"""Element type (its name in safetensors) and shape of a tensor, from the header."""

_TOO_LARGE = "the arguments make it larger than any memory"
_LARGEST_ARRAY = (1 << 63) - 1
_DIGEST_TAG = b"vqserve codebook digest 1"
# Older releases of torch have other names for this pair.
LEGACY_NAMES: Mapping[str, str] = {"embedding.weight_g": NORM, "embedding.weight_v": DIRECTION}


class StateError(ValueError):
    """The arguments or tensors do not fit together, or cannot be served."""


@dataclass(frozen=True)
class CodebookState:
    """Kind, constructor arguments and state dict of a quantizer, as numpy arrays under canonical names."""

    kind: str
    arguments: Mapping[str, object]
    tensors: Mapping[str, npt.NDArray[Any]]

    @classmethod
    def checked(
        cls,
        kind: str,
        arguments: Mapping[str, object],
        claims: Mapping[str, Claim],
        read: Callable[[str], npt.NDArray[Any]],
    ) -> Self:
        """Return the state of these arguments and tensors, if it can be served.

        Args:
            kind: a key of `KINDS`.
            arguments: of the constructor, unchecked; optional ones may be missing.
            claims: element type and shape of every tensor, by canonical or legacy name.
            read: returns the tensor of a name in `claims`; called only after all claims have been accepted.

        Raises:
            StateError: says what is wrong.
        """
        names = _canonical_names(set(claims))
        try:
            complete = KINDS[kind].canonical_arguments(check_arguments(kind, KINDS[kind].arguments, arguments))
        except ArgumentError as error:
            raise StateError(str(error)) from None
        num_codes = check_claims(kind, complete, {names[name]: claim for name, claim in claims.items()})
        state = cls(kind, complete, {names[name]: read(name) for name in claims})
        _check_values(state.tensors, num_codes)
        return state

    @classmethod
    def of_arrays(cls, kind: str, arguments: Mapping[str, object], arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Return the state of tensors that are in memory; see `checked`."""
        claims = {name: (dtype_name(array.dtype), array.shape) for name, array in arrays.items()}
        return cls.checked(kind, arguments, claims, arrays.__getitem__)

    @classmethod
    def of(cls, quantizer: Quantizer) -> Self:
        """Return a quantizer's state: what a file of it holds.

        The tensors are copies where the quantizer is not on the CPU, else they share its memory.

        Raises:
            CodebookError: it is of no kind that a file can hold, or its weights cannot be served.
        """
        kind = kind_of(quantizer)
        tensors = {name: tensor.detach().cpu() for name, tensor in quantizer.state_dict().items()}
        half = [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.itemsize < 4]
        if half:
            raise CodebookError(f"{half[0]} is {tensors[half[0]].dtype}: call .float() on the quantizer first")
        arrays = {name: tensor.contiguous().numpy() for name, tensor in tensors.items()}
        try:
            return cls.of_arrays(kind, quantizer.current_arguments(), arrays)
        except StateError as error:
            raise CodebookError(f"this {type(quantizer).__name__} cannot be kept as a codebook: {error}") from None

    def build(self, *, shares_memory: bool = False) -> Quantizer:
        """Return the quantizer, on the CPU and in eval mode; no state of the process has an effect on it.

        Args:
            shares_memory: whether it may use the memory of the tensors, and not copies.
        """
        from vqserve_server.codebooks.building import built  # noqa: PLC0415

        return built(self.kind, self.arguments, self.tensors, shares_memory=shares_memory)

    def plain(self, *, shares_memory: bool = False) -> PlainCodebook | None:
        """Return the codebook as arrays of float32; None: only its class can compute it, with a remap for example.

        Args:
            shares_memory: whether it may use the memory of the tensors, and not copies.
        """
        kind = self._unmapped_kind
        if kind is None or any(array.dtype == np.float64 for array in self.tensors.values()):
            return None
        return kind.plain(self.arguments, self.tensors if shares_memory else _copies(self.tensors))

    @property
    def layout(self) -> str | None:
        """The name of the layout of latents; None: it depends on the number of axes."""
        layout = self.arguments["layout"]
        return None if layout is None else str(layout)

    @property
    def num_plain_indices(self) -> int | None:
        """Number of the indices of one codebook without a remap: that of its codes; None: only the class knows."""
        kind = self._unmapped_kind
        return None if kind is None else kind.num_codes_of(self.arguments)

    @property
    def _unmapped_kind(self) -> type[PlainKind] | None:
        """What is declared of the kind; None: only the class knows, or there is a remap."""
        return None if USED in self.tensors else PLAIN_KINDS.get(self.kind)

    def digest(self) -> str:
        """Return the digest: equal exactly where encode and decode read the same."""
        cls = KINDS[self.kind]
        served = {name: array for name, array in self.tensors.items() if name not in cls.training_tensors}
        return digest(self.kind, cls.served_arguments(self.arguments, remapped=USED in served), served)

    def written_arguments(self) -> dict[str, object]:
        """Return the arguments that a file gives."""
        return written_arguments(KINDS[self.kind].arguments, self.arguments)


def _copies(tensors: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    return {name: array.copy() for name, array in tensors.items()}


def _canonical_names(names: set[str]) -> dict[str, str]:
    """Return each name's canonical one: the legacy names of weight norm become torch's present ones.

    Raises:
        StateError: a tensor is there under both names.
    """
    for legacy, current in LEGACY_NAMES.items():
        if legacy in names and current in names:
            raise StateError(f"it has both {legacy!r} and {current!r}, two names of one tensor")
    return {name: LEGACY_NAMES.get(name, name) for name in names}


def check_claims(kind: str, arguments: Mapping[str, Any], claims: Mapping[str, Claim]) -> int:
    """Check names, element types and shapes of tensors that need not be in memory yet.

    Args:
        kind: a key of `KINDS`.
        arguments: as `check_arguments` returns them.
        claims: of every tensor, by canonical name.

    Returns:
        K, the number of codes.

    Raises:
        StateError: the arguments contradict each other, or a tensor is missing, extra, or of another shape or element
            type than it should be.
    """
    expected, num_codes = _expected(kind, arguments)
    missing = sorted(set(expected) - set(claims))
    if missing:
        raise StateError(f"tensor {missing[0]!r} is missing")
    extra = sorted(set(claims) - set(expected) - ({USED} if "unknown_index" in arguments else set()))
    if extra:
        raise StateError(f"tensor {extra[0]!r} does not belong to kind {kind!r} with these arguments")
    floats = {name: dtype for name, (dtype, _) in claims.items() if name != USED}
    for name, dtype in sorted(floats.items()):
        known = BY_SAFETENSORS.get(dtype)
        if known in LATENTS and known.storage.itemsize < 4:
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
    return num_codes


def _expected(kind: str, arguments: Mapping[str, Any]) -> tuple[Mapping[str, tuple[int, ...]], int]:
    """Return the shape of every tensor but a remap, and K.

    Raises:
        StateError: the arguments contradict each other.
    """
    plain = PLAIN_KINDS.get(kind)
    if plain is None:
        from vqserve_server.codebooks.building import sizes_of_class  # noqa: PLC0415

        try:
            return sizes_of_class(kind, arguments)
        except InvalidOption as error:
            raise StateError(f"its arguments do not fit together: {error}") from None
        except RuntimeError:
            raise StateError(_TOO_LARGE) from None
    shapes = plain.tensor_shapes(arguments)
    if any(4 * math.prod(shape) > _LARGEST_ARRAY for shape in shapes.values()):
        raise StateError(_TOO_LARGE)
    return shapes, plain.num_codes_of(arguments)


def _check_used_claim(arguments: Mapping[str, Any], dtype: str, shape: tuple[int, ...]) -> None:
    if dtype != "I64":
        raise StateError(f"tensor {USED!r} is {dtype}, not I64")
    if len(shape) != 1 or shape[0] < 1:
        raise StateError(f"tensor {USED!r} has shape {list(shape)}: it must have one axis and not be empty")
    if shape[0] + (arguments["unknown_index"] == "extra") > LARGEST_VOCABULARY:
        raise StateError(f"tensor {USED!r} has {shape[0]} entries, more than an index can count")


def _check_values(tensors: Mapping[str, npt.NDArray[Any]], num_codes: int) -> None:
    """Check the values of tensors whose names, types and shapes are right.

    Raises:
        StateError: names the first tensor and position that cannot be served.
    """
    for name, array in sorted(tensors.items()):
        if name == USED:
            continue
        position = first_non_finite(array)
        if position is not None:
            raise StateError(f"{name}{list(position)} is {float(array[position])}")
    if DIRECTION in tensors:
        lengths = np.abs(tensors[DIRECTION]).max(axis=0)
        if not lengths.all():
            raise StateError(f"column {int(lengths.argmin())} of {DIRECTION} is zero and has no direction")
        # The weight is rounded to float32, and no entry of it is greater than its column's norm.
        if np.abs(tensors[NORM]).max() > np.finfo(np.float32).max:
            raise StateError(f"{NORM} holds a norm beyond float32's range")
    used = tensors.get(USED)
    if used is not None:
        outside = (used < 0) | (used >= num_codes)
        if outside.any():
            first = int(outside.argmax())
            raise StateError(f"{USED}[{first}] is {int(used[first])}, not in [0, {num_codes})")


def canonical_json(value: object) -> str:
    """Return JSON with sorted keys, no spaces and ASCII only: one text for one value.

    Raises:
        ValueError: the value holds NaN or infinity, which JSON has not.
        TypeError: the value holds what JSON has not.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(kind: str, arguments: Mapping[str, object], tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    """Return the lower-case hexadecimal SHA-256 of a codebook's canonical form.

    Every field carries its length, so that two different codebooks cannot have one form.

    Args:
        kind: "vq", "ema" and so on.
        arguments: those that encode and decode depend on, and no others.
        tensors: those that encode and decode read, and no others, under their canonical names.
    """
    sha = hashlib.sha256()

    def feed(field: bytes | memoryview) -> None:
        sha.update(len(field).to_bytes(8, "little"))
        sha.update(field)

    feed(_DIGEST_TAG)
    feed(kind.encode())
    feed(canonical_json(dict(arguments)).encode())
    for name in sorted(tensors):
        array = tensors[name]
        little_endian = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        feed(name.encode())
        feed(dtype_name(array.dtype).encode())
        feed(canonical_json(list(array.shape)).encode())
        feed(little_endian.reshape(-1).view(np.uint8).data)
    return sha.hexdigest()
