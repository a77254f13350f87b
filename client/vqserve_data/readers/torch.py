"""Files of torch.save: each tensor is an item. torch is not needed, and nothing in the file is run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vqserve import dtypes
from vqserve_data.foreign.torch_files import FileTensor, tensors_of
from vqserve_data.items import SourceArray
from vqserve_data.readers.handle import WHOLE_BYTES, Handle, check_numbers, open_source, stored_array
from vqserve_data.readers.members import Member, MembersReader
from vqserve_data.readers.protocol import SourceFile


class TorchReader(MembersReader):
    """Reads .pt and .pth files: a tensor, or dictionaries and lists of tensors. Large tensors are read part by part."""

    suffixes = (".pt", ".pth")

    def members(self, file: SourceFile) -> Sequence[Member]:
        """Return the tensors of a file by dotted name, in their order in it."""
        handle = open_source(file)
        return [
            Member(name, partial(_look, tensor), partial(_array, handle, tensor))
            for name, tensor in tensors_of(Path(file.name), handle.stream()).items()
        ]


def _look(tensor: FileTensor) -> tuple[tuple[int, ...], np.dtype[Any]]:
    known = dtypes.BY_NAME.get(tensor.tensor.dtype)
    dtype = np.dtype(tensor.tensor.dtype) if known is None else known.storage
    check_numbers(dtype)
    return tensor.tensor.shape, np.dtype(np.float32) if known is dtypes.BFLOAT16 else dtype


def _array(handle: Handle, tensor: FileTensor) -> SourceArray:
    start = tensor.plain_start()
    if start is not None and tensor.tensor.size > WHOLE_BYTES:
        is_bfloat16 = tensor.tensor.dtype == dtypes.BFLOAT16.name
        shape, dtype = _look(tensor)
        dtype = dtypes.BFLOAT16.storage if is_bfloat16 else dtype
        return stored_array(handle, start, shape, dtype, is_bfloat16=is_bfloat16)
    array = tensor.read()
    check_numbers(array.dtype)
    return array
