"""Files of safetensors, read by code of our own (docs/decisions/0006-own-safetensors-reader.md)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from vqserve.safetensors_file import NUMPY_DTYPES, TensorEntry, read_header
from vqserve_data.items import SourceArray
from vqserve_data.readers.handle import Handle, check_numbers, open_source, stored_array
from vqserve_data.readers.members import Member, MembersReader
from vqserve_data.readers.protocol import SourceFile

# About 100 bytes a tensor: files of items have many.
_MAX_HEADER_BYTES = 64 << 20
_BFLOAT16 = "BF16"


class SafetensorsReader(MembersReader):
    """Reads .safetensors files; large tensors are read part by part."""

    suffixes = (".safetensors",)

    def members(self, file: SourceFile) -> Sequence[Member]:
        """Return the tensors of a file in the order of their bytes."""
        handle = open_source(file)
        tensors = read_header(handle.stream(), max_header_bytes=_MAX_HEADER_BYTES).tensors
        return [
            Member(name, partial(_look, entry), partial(_array, handle, entry))
            for name, entry in sorted(tensors.items(), key=lambda tensor: (tensor[1].begin, tensor[0]))
        ]


def _dtype(entry: TensorEntry) -> np.dtype[Any]:
    dtype = NUMPY_DTYPES.get(entry.dtype)
    if dtype is None:
        raise ValueError(f"it is of type {entry.dtype}, which is not read")
    check_numbers(dtype)
    return dtype


def _look(entry: TensorEntry) -> tuple[tuple[int, ...], np.dtype[Any]]:
    dtype = _dtype(entry)
    return entry.shape, np.dtype(np.float32) if entry.dtype == _BFLOAT16 else dtype


def _array(handle: Handle, entry: TensorEntry) -> SourceArray:
    return stored_array(
        handle, entry.begin, entry.shape, _dtype(entry), stop=entry.end, is_bfloat16=entry.dtype == _BFLOAT16
    )
