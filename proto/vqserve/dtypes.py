"""The element types of arrays, in one table.

To add a type, add it to the .proto file and to the table here. numpy has no bfloat16, so its arrays hold bit patterns
as uint16 (docs/decisions/0009-bfloat16-as-uint16.md). This module never imports torch: callers that pass a torch type
have imported it.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from vqserve.errors import InvalidOption, quoted

LatentDTypeName: TypeAlias = Literal["float32", "float16", "bfloat16", "float64"]


class BFloat16:
    """bfloat16 as bit patterns: the upper half of a float32."""

    @staticmethod
    def widen_into(bits: npt.NDArray[Any], out: npt.NDArray[np.float32]) -> None:
        """Write the values of bit patterns to an array of the same shape."""
        np.left_shift(bits, np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)

    @staticmethod
    def round_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        """Return the bit patterns of values, rounded to nearest even; NaN stays NaN."""
        bits = np.asarray(values, dtype=np.float32, order="C").view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


@dataclass(frozen=True, eq=False)
class DType:
    """One element type.

    Attributes:
        name: name on the wire, in torch, and in numpy if numpy has the type.
        number: value of `DType` in the .proto file.
        storage: numpy type of the elements in memory, in files and on the wire: the type itself, or unsigned integers
            for bit patterns.
        safetensors: name in safetensors files.
        overflow: smallest magnitude that is rounded to infinity; infinite if values are never narrowed to the type.
        exponent: bits that are all set in NaN and infinity and in no other value, if comparing bits is the faster
            check; 0: compute with the values.
        coding: conversion of bit patterns to float32 and back; None if numpy has the type.
    """

    name: str
    number: int
    storage: np.dtype[Any]
    safetensors: str
    overflow: float = math.inf
    exponent: int = 0
    coding: type[BFloat16] | None = None

    @property
    def computed(self) -> np.dtype[Any]:
        """The type in which latents of this type are computed: float32, or float64 for float64."""
        return np.dtype(np.float64 if self.storage.itemsize == 8 else np.float32)

    def widen(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return an array that numpy can compute with: bit patterns become float32, exactly; other types stay."""
        if self.coding is None:
            return array
        values = np.empty(np.shape(array), np.float32)
        self.coding.widen_into(array, values)
        return values

    def narrow(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return values in `storage`, each rounded once to nearest even; bit patterns stay.

        Args:
            values: of any type of latents that numpy has, or already in `storage`.
        """
        if self.coding is None or values.dtype == self.storage:
            return values.astype(self.storage, copy=False)
        return self.coding.round_bits(_for_rounding(values))


LATENTS = (
    DType("float32", 1, np.dtype("<f4"), "F32", overflow=float.fromhex("0x1.ffffffp127")),
    DType("float16", 2, np.dtype("<f2"), "F16", overflow=65520.0, exponent=0x7C00),
    DType(
        "bfloat16", 3, np.dtype("<u2"), "BF16", overflow=float.fromhex("0x1.ffp127"), exponent=0x7F80, coding=BFloat16
    ),
    DType("float64", 4, np.dtype("<f8"), "F64"),
)
INDICES = (
    DType("uint8", 5, np.dtype("<u1"), "U8"),
    DType("uint16", 6, np.dtype("<u2"), "U16"),
    DType("uint32", 7, np.dtype("<u4"), "U32"),
    DType("int32", 8, np.dtype("<i4"), "I32"),
    DType("int64", 9, np.dtype("<i8"), "I64"),
)
DTYPES = LATENTS + INDICES
LATENT_NAMES = tuple(dtype.name for dtype in LATENTS)
INDEX_NAMES = tuple(dtype.name for dtype in INDICES)

BFLOAT16 = LATENTS[2]

BY_NAME = {dtype.name: dtype for dtype in DTYPES}
BY_NUMBER = {dtype.number: dtype for dtype in DTYPES}
BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in DTYPES}
# Latent types by numpy type, in any byte order; uint16 stands for bfloat16.
LATENTS_BY_STORAGE = {
    storage: dtype for dtype in LATENTS for storage in (dtype.storage, dtype.storage.newbyteorder(">"))
}
# The types that numpy has.
_BY_NUMPY = {dtype.storage: dtype for dtype in DTYPES if dtype.coding is None}
_UNSIGNED = tuple(dtype.storage for dtype in INDICES if dtype.storage.kind == "u")


def of_numpy(dtype: np.dtype[Any]) -> DType | None:
    """Return the type of a numpy type, of any byte order; None if it is not in the table."""
    return _BY_NUMPY.get(dtype) or _BY_NUMPY.get(dtype.newbyteorder("<"))


def of_torch(dtype: object) -> DType | None:
    """Return the type of a torch type; None if it is not in the table."""
    return BY_NAME.get(str(dtype).removeprefix("torch."))


def latent_dtype_name(dtype: object) -> str:
    """Return the name of a latent type: "float16" for "float16", numpy.float16 and torch.float16, and so on.

    Args:
        dtype: a name, a numpy scalar type or dtype (of this machine's byte order), or a torch dtype.

    Raises:
        InvalidOption: latents cannot have this type; the error lists the allowed ones.
    """
    torch = sys.modules.get("torch")
    name: object = dtype
    if isinstance(dtype, np.dtype) and dtype.isnative:
        name = dtype.name
    elif isinstance(dtype, type) and issubclass(dtype, np.generic):
        name = dtype.__name__
    elif torch is not None and isinstance(dtype, torch.dtype):
        name = str(dtype).removeprefix("torch.")
    if isinstance(name, str) and name in LATENT_NAMES:
        return name
    known = ", ".join(repr(known) for known in LATENT_NAMES)
    raise InvalidOption(
        f"{{option}} must be one of {known} or numpy's or torch's type of that name, not {quoted(dtype, 60)}",
        option="dtype",
    )


def smallest_unsigned(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest unsigned type that holds every index in [0, vocab_size)."""
    return next((dtype for dtype in _UNSIGNED if vocab_size <= 1 << 8 * dtype.itemsize), _UNSIGNED[-1])


def smallest_holding(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """Return the narrowest integer type of the table that holds all values of another integer type; None: none does."""
    wider = (known.storage for known in INDICES if np.can_cast(dtype, known.storage, "safe"))
    return min(wider, key=lambda known: known.itemsize, default=None)


def _for_rounding(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return values as float32 that a second rounding makes what one rounding would."""
    if values.dtype != np.float64:
        return values.astype(np.float32, copy=False)
    with np.errstate(over="ignore", under="ignore"):
        nearest = values.astype(np.float32)
    odd: npt.NDArray[np.float32] = round_to_odd(nearest, values, np)
    return odd


def round_to_odd(nearest: Any, values: Any, library: ModuleType) -> Any:
    """Return float64 values as float32: inexact ones as the neighbour whose last bit is 1.

    Rounded again to a narrower type, to nearest, the result is as if rounded once. Two roundings to nearest are not:
    they may end next to the nearest (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved
    algorithms using rounding to odd", 2008). float32 has the two extra bits that this needs.

    Args:
        nearest: the values rounded to float32, to nearest; overwritten with the result.
        values: float64, numpy or torch.
        library: numpy or torch, whose arrays these are.
    """
    bits = nearest.view(library.int32)
    bits -= (abs(nearest) > abs(values)).view(library.int8)
    bits |= (nearest != values).view(library.int8)
    return nearest


def to_numpy(tensor: Any) -> npt.NDArray[Any]:
    """Return the memory of a torch tensor on the CPU as numpy, not copied: bit patterns of types that numpy lacks.

    Raises:
        TypeError: neither numpy nor the table has the type.
    """
    dtype = of_torch(tensor.dtype)
    if dtype is None or dtype.coding is None:
        array: npt.NDArray[Any] = tensor.numpy()
        return array
    torch = sys.modules["torch"]
    # Not every torch has unsigned types of all widths.
    bits = getattr(torch, f"int{8 * dtype.storage.itemsize}") if dtype.storage.itemsize > 1 else torch.uint8
    patterns: npt.NDArray[Any] = tensor.view(bits).numpy()
    return patterns.view(dtype.storage)


def to_torch(array: npt.NDArray[Any], name: str) -> Any:
    """Return a tensor on an array's memory, not copied: of bit patterns, the type of this name."""
    torch = sys.modules["torch"]
    dtype = BY_NAME[name]
    if dtype.coding is None:
        return torch.from_numpy(array)
    signed = array.view(f"i{array.itemsize}") if array.itemsize > 1 else array
    return torch.from_numpy(signed).view(getattr(torch, name))
