"""Files of safetensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy.typing as npt

from vqserve import dtypes
from vqserve.errors import ForeignCheckpointError
from vqserve_server.codebooks.safetensors_file import NUMPY_DTYPES, TensorEntry, read_header, read_tensor
from vqserve_tools.importing.files.foreign_array import ForeignArray, check_size


@contextmanager
def open_safetensors(path: Path) -> Iterator[Mapping[str, ForeignArray]]:
    """Yield the tensors of a safetensors file by name."""
    with path.open("rb") as file:

        def reader(name: str, entry: TensorEntry) -> Callable[[], npt.NDArray[Any]]:
            def read() -> npt.NDArray[Any]:
                check_size(f"{path.name}: {name}", entry.end - entry.begin)
                array = read_tensor(file, entry)
                dtype = dtypes.BY_SAFETENSORS.get(entry.dtype)
                return array if dtype is None else dtype.widen(array)

            return read

        header = read_header(file)
        if "vqserve.format" in header.metadata:
            # The arguments of a codebook are in the metadata, which an import does not read.
            raise ForeignCheckpointError(
                f"{path.name}: it is already a codebook file of vqserve: serve it without an import"
            )
        yield {
            name: ForeignArray(entry.shape, _safetensors_dtype(entry.dtype), reader(name, entry))
            for name, entry in header.tensors.items()
        }


def _safetensors_dtype(name: str) -> str:
    if name in dtypes.BY_SAFETENSORS:
        return dtypes.BY_SAFETENSORS[name].name
    return NUMPY_DTYPES[name].name if name in NUMPY_DTYPES else name
