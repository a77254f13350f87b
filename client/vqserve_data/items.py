"""An item: one array of a data set, with its key and what else belongs to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
# A part of an array: one slice for each axis.
Cut = tuple[slice, ...]


class SourceArray(Protocol):
    """An array that is read part by part when it is indexed: numpy's arrays, `NpyFile`, h5py's and zarr's."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of its elements."""

    def __getitem__(self, cut: Cut, /) -> Array:
        """Return a part.

        Raises:
            FileError: it cannot be read.
        """


@dataclass(frozen=True, slots=True)
class Item:
    """One array of a data set.

    Attributes:
        key: name of the item, unique in the data set: "a/b" for a/b.npy, "a/b/c" for member c of a/b.npz. Its parts
            between slashes are neither empty nor "." or "..".
        array: the latents or indices. What numpy lacks (bfloat16) is read as float32 with the same values.
        source: path or URL of the file that it came from.
        fields: what else belongs to it, such as captions, labels and ids, by name: str, bytes, numbers or arrays.
    """

    key: str
    array: SourceArray
    source: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RawItem:
    """What belongs to one key, as it is in the file, for a function that makes the array of it.

    Attributes:
        key: as of an item.
        source: path or URL of the file that it came from.
        fields: of a sample of a tar the bytes of its members by extension ("jpg"), of a row of a table all columns,
            of a file of another format its bytes under its suffix ("jpg", "" if it has none).
    """

    key: str
    source: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BadItem:
    """An item that could not be read; the data set goes on after it.

    Attributes:
        key: its key, or of a file that cannot be read at all the key of the file.
        source: path or URL of the file.
        reason: one line: what is wrong, without the path.
    """

    key: str
    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of an item before its array is read.

    Attributes:
        key: as of the item.
        shape: shape of its array; None: not known before it is read.
        dtype: element type; None: not known before it is read.
    """

    key: str
    shape: tuple[int, ...] | None = None
    dtype: np.dtype[Any] | None = None


# What a reader yields.
Record = Item | RawItem | BadItem
