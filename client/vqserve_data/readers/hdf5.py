"""Files of HDF5: each data set in any group is an item."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from vqserve_data.errors import FileError, MissingLibrary
from vqserve_data.items import Array, Cut, SourceArray
from vqserve_data.keys import one_line
from vqserve_data.readers.handle import MAX_CHUNK_BYTES, MOST_OF_A_BYTE, WHOLE_BYTES, check_numbers, open_source
from vqserve_data.readers.members import Member, MembersReader
from vqserve_data.readers.protocol import SourceFile

# Contiguous data, and small data in the header of its data set, take their own size.
_HARMLESS_BYTES = 1 << 20


class Hdf5Reader(MembersReader):
    """Reads .h5 and .hdf5 files; large data sets are read part by part."""

    suffixes = (".h5", ".hdf5")

    def members(self, file: SourceFile) -> Sequence[Member]:
        """Return the data sets of all groups by name. Links are not followed, so that no other file is read."""
        try:
            import h5py  # noqa: PLC0415
        except ImportError as error:
            raise MissingLibrary("reading HDF5", extra="hdf5") from error
        source = open_source(file).stream() if file.path is None else str(file.path)
        opened = h5py.File(source, "r", locking=False) if file.path is not None else h5py.File(source, "r")
        names: list[str] = []
        opened.visititems(lambda name, node: names.append(name) if isinstance(node, h5py.Dataset) else None)
        return [
            Member(name, partial(_look, opened, name), partial(_array, file, opened, name)) for name in sorted(names)
        ]


def _look(opened: Any, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    return _outline(opened[name])


def _outline(dataset: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    if dataset.shape is None:
        raise ValueError("it holds no array")
    check_numbers(dataset.dtype)
    return dataset.shape, dataset.dtype


def _array(file: SourceFile, opened: Any, name: str) -> SourceArray:
    dataset = opened[name]
    shape, dtype = _outline(dataset)
    if dataset.is_virtual or dataset.external:
        raise ValueError("its numbers are in other files, which are not read")
    nbytes = math.prod(shape) * dtype.itemsize
    stored = dataset.id.get_storage_size()
    # What was never written takes no space, and reads as zeros of any number.
    if nbytes > max(stored * MOST_OF_A_BYTE, _HARMLESS_BYTES if stored else 0):
        raise ValueError(f"an array of shape {shape} needs {nbytes} bytes and {stored} are stored: it is incomplete")
    if dataset.chunks is not None and math.prod(dataset.chunks) * dtype.itemsize > MAX_CHUNK_BYTES:
        raise ValueError(f"its chunks of shape {dataset.chunks} have more than {MAX_CHUNK_BYTES} bytes")
    if nbytes <= WHOLE_BYTES:
        whole: Array = dataset[()]
        return np.asarray(whole)
    return _LargeDataset(file.name, opened, dataset)


class _LargeDataset:
    """A data set that is read when it is indexed, as long as it is referred to."""

    def __init__(self, name: str, opened: Any, dataset: Any) -> None:
        self._name = name
        # Where the file is closed, its data sets are.
        self._opened = opened
        self._dataset = dataset
        self.shape: tuple[int, ...] = dataset.shape
        self.dtype: np.dtype[Any] = dataset.dtype

    def __getitem__(self, cut: Cut) -> Array:
        try:
            part: Array = self._dataset[cut]
        except Exception as error:
            raise FileError(f"cannot read {self._name}: {one_line(error)}") from error
        return part
