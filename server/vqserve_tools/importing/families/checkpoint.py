"""The arrays under one prefix of a foreign file, and what has been taken of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vqserve_server.errors import ForeignCheckpointError
from vqserve_server.validation import first_non_finite
from vqserve_tools.importing.foreign import ForeignArray


@dataclass
class Ledger:
    """What a reader took of a file.

    Attributes:
        taken: names in the file, with shape and element type.
        notes: what else a person should know.
    """

    taken: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoint:
    """Arrays by the names that they have below a prefix.

    Attributes:
        file: the file's name, for messages.
        arrays: all of the file's, by their full names.
        prefix: what the names begin with; "" or ending in a dot.
        ledger: what has been taken, shared by the views of one file.
    """

    file: str
    arrays: Mapping[str, ForeignArray]
    prefix: str = ""
    ledger: Ledger = field(default_factory=Ledger)

    def at(self, place: str) -> Checkpoint:
        """Return the view of what is below `place`."""
        return Checkpoint(self.file, self.arrays, self.prefix + place, self.ledger)

    def names(self) -> dict[str, ForeignArray]:
        """Return the arrays below the prefix, by what follows it."""
        return {
            name.removeprefix(self.prefix): array for name, array in self.arrays.items() if name.startswith(self.prefix)
        }

    def __contains__(self, name: object) -> bool:
        return f"{self.prefix}{name}" in self.arrays

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an array, without taking it."""
        return self.arrays[f"{self.prefix}{name}"].shape

    def refusal(self, text: str) -> ForeignCheckpointError:
        """Return the error that says what is wrong with the file."""
        return ForeignCheckpointError(f"{self.file}: {text}")

    def note(self, text: str) -> None:
        """Tell a person."""
        self.ledger.notes.append(text)

    def check_known(self, names: Iterable[str], modules: Iterable[str] | None = None) -> None:
        """Refuse arrays that no reader knows: they may change what is computed.

        Args:
            names: that are known.
            modules: first components of the names that are looked at; None: all.

        Raises:
            ForeignCheckpointError: names the first that is not known.
        """
        within = None if modules is None else set(modules)
        looked_at = {name for name in self.names() if within is None or name.partition(".")[0] in within}
        strange = sorted(looked_at - set(names))
        if strange:
            raise self.refusal(
                f"{self._where()} there is {strange[0]!r} too, which none of the quantizers here has: what it means is "
                "not guessed (the codes' array alone is imported by --key)"
            )

    def floats(self, name: str, *, rank: int | None = None, what: str = "") -> npt.NDArray[np.float32]:
        """Take an array of floating-point numbers, as float32.

        Args:
            name: below the prefix.
            rank: how many axes it must have.
            what: what an array of another rank should be.

        Raises:
            ForeignCheckpointError: it is missing, of another rank or type, not finite, or beyond float32's range.
        """
        full, array = self._entry(name, rank, what)
        values = array.read()
        if values.dtype.kind != "f" or values.dtype.itemsize > 8:
            raise self.refusal(f"{full} is {array.dtype}: a codebook holds floating-point numbers")
        position = first_non_finite(values.astype(values.dtype.newbyteorder("="), copy=False))
        if position is not None:
            raise self.refusal(f"{full}{list(position)} is {float(values[position])}")
        with np.errstate(over="ignore"):
            narrowed = values.astype(np.float32)
        if values.dtype.itemsize > 4:
            position = first_non_finite(narrowed)
            if position is not None:
                raise self.refusal(f"{full}{list(position)} is {float(values[position])}, beyond float32's range")
            rounded = int(np.count_nonzero(narrowed != values))
            exactly = f"{rounded} of {values.size} numbers were rounded" if rounded else "exactly"
            self.note(f"{full}: float64 to float32, {exactly}")
        elif array.dtype != "float32":
            self.note(f"{full}: {array.dtype} to float32, exactly")
        self._take(full, array)
        return narrowed

    def integers(self, name: str, what: str) -> npt.NDArray[np.int64]:
        """Take a list of integers, as int64: what is beyond it wraps to a number below zero.

        Args:
            name: below the prefix.
            what: it is, for messages.

        Raises:
            ForeignCheckpointError: it is missing, has not one axis, or holds other numbers.
        """
        full, array = self._entry(name, 1, f"{what} has one axis")
        values = array.read()
        if values.dtype.kind not in "iu":
            raise self.refusal(f"{full} is {array.dtype}: {what} holds integers")
        self._take(full, array)
        return values.astype(np.int64)

    def _entry(self, name: str, rank: int | None, what: str) -> tuple[str, ForeignArray]:
        full = f"{self.prefix}{name}"
        array = self.arrays.get(full)
        if array is None:
            raise self.refusal(f"array {full!r} is missing")
        if rank is not None and len(array.shape) != rank:
            raise self.refusal(f"{full or 'array'} has shape {shape_text(array.shape)}: {what}")
        return full or "array", array

    def _take(self, full: str, array: ForeignArray) -> None:
        self.ledger.taken[full] = f"{shape_text(array.shape)} {array.dtype}"

    def _where(self) -> str:
        return f"under {self.prefix!r}" if self.prefix else "at its root"


def shape_text(shape: tuple[int, ...]) -> str:
    """Return "1024x8" for (1024, 8)."""
    return "x".join(str(length) for length in shape) or "scalar"


def listed(names: Iterable[str], limit: int = 12) -> str:
    """Return names in one line, a long list cut short."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def places_of(arrays: Iterable[str], ending: str) -> set[str]:
    """Return what stands before `ending`, a whole component or several, in the names that end so."""
    return {name.removesuffix(ending) for name in arrays if name == ending or name.endswith(f".{ending}")}
