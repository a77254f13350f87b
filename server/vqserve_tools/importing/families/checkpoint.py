"""The arrays and linear layers under one prefix of a foreign file, and the record of arrays that were taken.

Layers can be plain, 1x1 convolutions, with weight norm, or without a bias.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from vqserve.errors import ForeignCheckpointError
from vqserve.text import printable
from vqserve_server.search import rounding
from vqserve_server.validation import first_non_finite
from vqserve_tools.importing.families.name_lists import accept_text, accepts, common_module, modules_of
from vqserve_tools.importing.files import ForeignArray

Floats: TypeAlias = npt.NDArray[np.float32]

# torch's names of the norms and directions of weight norm; the older pair first.
_NORMED = (("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1"))
# What quantizers have beside their stages: modules that are numbered as the stages are (`in_proj.3.weight`), and arrays
# of all stages (`cluster_size`, (n_q, K)).
_STAGE_MODULES = frozenset(
    f"{name}{plural}"
    for name in ("in_proj", "out_proj", "input_proj", "output_proj", "project_in", "project_out", "projection")
    for plural in ("", "s")
) | {"codebooks", "embeddings", "scales", "norms"}
_STAGE_ARRAYS = frozenset({"cluster_size", "cluster_usage", "embed_avg"})
# All names of arrays that a layer can have.
LAYER_NAMES = frozenset({"weight", "bias", *(name for pair in _NORMED for name in pair)})
# A line with more names than this would not be read; no model has as many candidates.
_MAX_LISTED = 1000


@dataclass
class Ledger:
    """Record of what a reader took from a file.

    Attributes:
        taken: shape and element type of each taken array, by its name in the file.
        known: names in the file that the reader knows, taken or not.
        columns: names of codebooks whose columns are the codes.
        accepted: names, and prefixes that end in ".*", of arrays that the user accepts to leave.
        notes: further information for the user.
    """

    taken: dict[str, str] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    columns: set[str] = field(default_factory=set)
    accepted: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    def accepts(self, name: str) -> bool:
        """Return whether the user accepts that an array is left."""
        return any(accepts(pattern, name) for pattern in self.accepted)


@dataclass(frozen=True)
class Checkpoint:
    """View of the arrays of a file under a prefix.

    Attributes:
        file: name of the file, for messages.
        arrays: all arrays of the file, by full name.
        prefix: prefix of the names in this view; "" or ending in a dot.
        ledger: record of the taken arrays, shared by all views of one file.
    """

    file: str
    arrays: Mapping[str, ForeignArray]
    prefix: str = ""
    ledger: Ledger = field(default_factory=Ledger)

    def at(self, place: str) -> Checkpoint:
        """Return the view of the arrays below `place`."""
        return Checkpoint(self.file, self.arrays, self.prefix + place, self.ledger)

    def names(self) -> dict[str, ForeignArray]:
        """Return the arrays below the prefix, by the rest of their name."""
        return {
            name.removeprefix(self.prefix): array for name, array in self.arrays.items() if name.startswith(self.prefix)
        }

    def __contains__(self, name: object) -> bool:
        return f"{self.prefix}{name}" in self.arrays

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an array, without taking it."""
        return self.arrays[f"{self.prefix}{name}"].shape

    def error(self, text: str) -> ForeignCheckpointError:
        """Return an error about the file."""
        return ForeignCheckpointError(f"{self.file}: {text}")

    def has_codes_in_columns(self, name: str) -> None:
        """Record that the columns of an array are the codes."""
        self.ledger.columns.add(f"{self.prefix}{name}")

    def knows(self, name: str) -> None:
        """Record that the reader knows an array, by its full name, and leaves it."""
        self.ledger.known.add(name)

    def note(self, text: str) -> None:
        """Add information for the user."""
        self.ledger.notes.append(printable(text))

    def check_known(self, names: Iterable[str], modules: Iterable[str] | None = None) -> None:
        """Check that the reader knows all arrays; an unknown array may change the results of the model.

        Args:
            names: known names.
            modules: first components of the names to check; None: all names.

        Raises:
            ForeignCheckpointError: arrays are not known, and the user does not accept to leave them.
        """
        within = None if modules is None else set(modules)
        checked = {name for name in self.names() if within is None or name.partition(".")[0] in within}
        names = set(names)
        self.ledger.known.update(f"{self.prefix}{name}" for name in names)
        unknown = [f"{self.prefix}{name}" for name in sorted(checked - names)]
        unknown = [name for name in unknown if not self.ledger.accepts(name)]
        if unknown:
            raise self.error(
                f"{self._where()} there is {described(self, unknown)} too, which is not part of any known quantizer; "
                f"without it the tokens may be wrong; if the model encodes without it, pass {accept_text(unknown)}"
            )

    def floats(self, name: str, *, rank: int | None = None, what: str = "") -> npt.NDArray[np.float32]:
        """Take an array of floating-point numbers, converted to float32.

        Args:
            name: name below the prefix.
            rank: required number of axes; None: any.
            what: description of the expected shape, for error messages.

        Raises:
            ForeignCheckpointError: the array is missing, has another rank or type, is not finite, or overflows float32.
        """
        full, array = self._entry(name, rank, what)
        values = array.read()
        if values.dtype.kind != "f" or values.dtype.itemsize > 8:
            raise self.error(f"{full} is {array.dtype}: a codebook holds floating-point numbers")
        position = first_non_finite(values.astype(values.dtype.newbyteorder("="), copy=False))
        if position is not None:
            raise self.error(f"{full}{list(position)} is {float(values[position])}")
        with np.errstate(over="ignore"):
            narrowed = values.astype(np.float32)
        if values.dtype.itemsize > 4:
            position = first_non_finite(narrowed)
            if position is not None:
                raise self.error(f"{full}{list(position)} is {float(values[position])}, beyond float32's range")
            rounded = int(np.count_nonzero(narrowed != values))
            exactly = f"{rounded} of {values.size} numbers were rounded" if rounded else "exactly"
            self.note(f"{full}: float64 to float32, {exactly}")
        elif array.dtype != "float32":
            self.note(f"{full}: {array.dtype} to float32, exactly")
        self._take(full, array)
        return narrowed

    def columns(self, name: str) -> Floats:
        """Take an array (D, K) with a column for each code, and return it as (K, D); see `floats`."""
        self.has_codes_in_columns(name)
        return np.ascontiguousarray(self.floats(name, rank=2).T)

    def integers(self, name: str, what: str) -> npt.NDArray[np.int64]:
        """Take an array of integers with one axis, as int64; unsigned numbers beyond int64 become negative.

        Args:
            name: name below the prefix.
            what: description of the array, for error messages.

        Raises:
            ForeignCheckpointError: the array is missing, has another number of axes, or holds other numbers.
        """
        full, array = self._entry(name, 1, f"{what} has one axis")
        values = array.read()
        if values.dtype.kind not in "iu":
            raise self.error(f"{full} is {array.dtype}: {what} holds integers")
        self._take(full, array)
        return values.astype(np.int64)

    def _entry(self, name: str, rank: int | None, what: str) -> tuple[str, ForeignArray]:
        full = f"{self.prefix}{name}"
        array = self.arrays.get(full)
        if array is None:
            raise self.error(f"array {full!r} is missing")
        if rank is not None and len(array.shape) != rank:
            raise self.error(f"{full or 'array'} has shape {shape_text(array.shape)}: {what}")
        return full or "array", array

    def _take(self, full: str, array: ForeignArray) -> None:
        stored = f", stored as {array.stored_as}" if array.stored_as else ""
        self.ledger.taken[full] = f"{shape_text(array.shape)} {array.dtype}{stored}"

    def _where(self) -> str:
        return f"under {self.prefix!r}" if self.prefix else "at its root"


def shape_text(shape: tuple[int, ...]) -> str:
    """Return "1024x8" for (1024, 8)."""
    return "x".join(str(length) for length in shape) or "scalar"


def listed(names: Iterable[str]) -> str:
    """Return names in one line; a list of more than a thousand is cut."""
    names = list(names)
    return ", ".join(names[:_MAX_LISTED]) + (
        f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    )


def described(checkpoint: Checkpoint, names: Iterable[str]) -> str:
    """Return arrays for a message, with their shapes; many are listed by module."""
    names = list(names)
    modules = modules_of(names, common_module(names))
    return listed(
        f"{module} ({len(inner)} arrays)"
        if len(inner) > 1
        else f"{inner[0]} ({shape_text(checkpoint.arrays[inner[0]].shape)})"
        for module, inner in modules.items()
    )


def places_of(arrays: Iterable[str], ending: str) -> set[str]:
    """Return the prefixes of the names that end in `ending`, where `ending` is one or more whole components."""
    return {name.removesuffix(ending) for name in arrays if name == ending or name.endswith(f".{ending}")}


@dataclass(frozen=True)
class Layer:
    """A linear layer: weight (outputs, inputs) and bias (outputs,)."""

    weight: Floats
    bias: Floats

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        return int(self.weight.shape[1])

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return int(self.weight.shape[0])


def has_layer(checkpoint: Checkpoint, name: str) -> bool:
    """Return whether there is a layer of this name."""
    return any(f"{name}.{end}" in checkpoint for end in ("weight", _NORMED[0][1], _NORMED[1][1]))


def read_layer(checkpoint: Checkpoint, name: str, *, biased: bool = False) -> Layer:
    """Take a layer. A missing bias becomes zeros; weight norm is computed exactly and rounded once.

    Weight norm has a norm for every output (torch's dim=0).

    Args:
        checkpoint: view that has the layer.
        name: name of the layer in the view.
        biased: whether the family's layers always have a bias, so that a missing one is an error.

    Raises:
        ForeignCheckpointError: the layer is missing or damaged, or is a convolution over several elements.
    """
    normed = next((pair for pair in _NORMED if f"{name}.{pair[1]}" in checkpoint), None)
    weights = [end for end in ("weight", *(pair[1] for pair in _NORMED)) if f"{name}.{end}" in checkpoint]
    if len(weights) > 1:
        both = " and ".join(weights)
        raise checkpoint.error(f"{checkpoint.prefix}{name} has {both}: which of them the model uses is not known")
    if normed is None:
        weight = _matrix(checkpoint, f"{name}.weight")
    else:
        weight = _weight_norm(checkpoint, *(f"{name}.{end}" for end in normed))
    has_bias = biased or f"{name}.bias" in checkpoint
    bias = checkpoint.floats(f"{name}.bias", rank=1, what="a bias has one axis") if has_bias else None
    if bias is not None and bias.shape != weight.shape[:1]:
        raise checkpoint.error(f"{checkpoint.prefix}{name}: its bias and weight do not fit together")
    return Layer(weight, np.zeros(len(weight), np.float32) if bias is None else bias)


def read_pair(
    checkpoint: Checkpoint, names: tuple[str, str], *, biased: bool = False
) -> tuple[Layer | None, Layer | None]:
    """Take the projections before and after the codes, or return (None, None) if the checkpoint has neither.

    Raises:
        ForeignCheckpointError: the checkpoint has only one of them, or only one of them has a bias.
    """
    if not layer_names(names) & checkpoint.names().keys():
        return None, None
    # One constructor makes both layers: a single bias means that the other is missing.
    biased = biased or any(f"{name}.bias" in checkpoint for name in names)
    return read_layer(checkpoint, names[0], biased=biased), read_layer(checkpoint, names[1], biased=biased)


def numbered(checkpoint: Checkpoint, module: str, names: Iterable[str]) -> list[Checkpoint]:
    """Return the views of `module.0.`, `module.1.` and so on, up to the greatest number in the names.

    Raises:
        ForeignCheckpointError: a number is missing, or other arrays beside the module are for more stages.
    """
    names = list(names)
    matches = [re.match(rf"{re.escape(module)}\.(\d+)\.", name) for name in names]
    numbers = sorted({int(match[1]) for match in matches if match})
    if numbers != list(range(len(numbers))):
        missing = min(set(range(len(numbers))) - set(numbers))
        raise checkpoint.error(f"{checkpoint.prefix}{module}.{missing} is missing, and later ones exist")
    if numbers:
        _check_siblings(checkpoint, module, names, len(numbers))
    return [checkpoint.at(f"{module}.{number}.") for number in numbers]


def _check_siblings(checkpoint: Checkpoint, module: str, names: Iterable[str], count: int) -> None:
    """Check that no array beside a module of `count` stages is for a further stage.

    Raises:
        ForeignCheckpointError: there is one; stages of the module are missing.
    """
    outside = "".join(module.rpartition(".")[:2])
    for name in names:
        first, _, rest = name.removeprefix(outside).partition(".")
        number = rest.partition(".")[0]
        shape = checkpoint.shape(name)
        stages = 0
        if first in _STAGE_MODULES and number.isdecimal():
            stages = int(number) + 1
        elif first in _STAGE_ARRAYS and not rest and len(shape) > 1:
            stages = shape[0]
        if name.startswith(outside) and stages > count:
            raise checkpoint.error(
                f"{checkpoint.prefix}{module}.{count} is missing, and {checkpoint.prefix}{name} is for {stages} stages"
            )


def layer_names(names: Iterable[str]) -> set[str]:
    """Return all array names that layers of these names can have."""
    return {f"{name}.{end}" for name in names for end in LAYER_NAMES}


def _matrix(checkpoint: Checkpoint, name: str) -> Floats:
    values = checkpoint.floats(name)
    if values.ndim < 2 or math.prod(values.shape[2:]) != 1:
        raise checkpoint.error(
            f"{checkpoint.prefix}{name} has shape {shape_text(values.shape)}: a projection maps single elements"
        )
    return values.reshape(values.shape[:2])


def _weight_norm(checkpoint: Checkpoint, norm: str, direction: str) -> Floats:
    v = _matrix(checkpoint, direction)
    g = checkpoint.floats(norm)
    if g.shape != (len(v), *(1,) * (g.ndim - 1)):
        raise checkpoint.error(
            f"{checkpoint.prefix}{norm} has shape {shape_text(g.shape)}: it should have a norm for each output"
        )
    if not np.abs(v).max(axis=1, initial=0).all():
        raise checkpoint.error(f"{checkpoint.prefix}{direction} has an output of zeros, which has no direction")
    # rounding.weight_norm takes one norm per column.
    columns = torch.from_numpy(np.ascontiguousarray(v.T)), torch.from_numpy(g.reshape(1, -1))
    weight = rounding.weight_norm(*columns).numpy().T
    return np.ascontiguousarray(weight)
