"""The arrays under one prefix of a foreign file, and the record of arrays that were taken."""

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
    """Record of what a reader took from a file.

    Attributes:
        taken: shape and element type of each taken array, by its name in the file.
        notes: further information for the user.
    """

    taken: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


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

    def refusal(self, text: str) -> ForeignCheckpointError:
        """Return an error about the file."""
        return ForeignCheckpointError(f"{self.file}: {text}")

    def note(self, text: str) -> None:
        """Add information for the user."""
        self.ledger.notes.append(text)

    def check_known(self, names: Iterable[str], modules: Iterable[str] | None = None) -> None:
        """Check that the reader knows all arrays; an unknown array may change the results of the model.

        Args:
            names: known names.
            modules: first components of the names to check; None: all names.

        Raises:
            ForeignCheckpointError: an array is not known; the error names the first one.
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
    """Return names in one line; a list longer than `limit` is cut."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def places_of(arrays: Iterable[str], ending: str) -> set[str]:
    """Return the prefixes of the names that end in `ending`, where `ending` is one or more whole components."""
    return {name.removesuffix(ending) for name in arrays if name == ending or name.endswith(f".{ending}")}
