"""Files of safetensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy.typing as npt

from vqserve import dtypes
from vqserve.errors import ForeignCheckpointError
from vqserve.safetensors_file import NUMPY_DTYPES, TensorEntry, read_header, read_tensor
from vqserve_data.foreign.foreign_array import ForeignArray, check_size

# Keys of the metadata that are never names of tensors, whatever the tensors are called.
_NO_NAMES = frozenset({"format"})
# Models have thousands of tensors; a header can have a million short names.
_MAX_OTHER_NAMES = 1 << 17
# torch.distributed.checkpoint writes pieces of tensors, and this key with their positions in the whole ones.
_PIECES = "DCP_SHARDING_INFO"


@contextmanager
def open_safetensors(path: Path) -> Iterator[Mapping[str, ForeignArray]]:
    """Yield the tensors of a safetensors file by name; a tensor that is stored once for several names has them all."""
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
        if _PIECES in header.metadata:
            raise ForeignCheckpointError(
                f"{path.name}: it has pieces of tensors, which torch.distributed.checkpoint wrote: join its files with "
                "torch.distributed.checkpoint's consolidate_safetensors_files, and import the result"
            )
        arrays = {
            name: ForeignArray(entry.shape, _safetensors_dtype(entry.dtype), reader(name, entry))
            for name, entry in header.tensors.items()
        }
        others = _other_names(path, arrays, header.metadata)
        yield arrays | {name: replace(arrays[stored], stored_as=stored) for name, stored in others.items()}


def _other_names(path: Path, arrays: Collection[str], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the further names of stored tensors, each with the name that the tensor is stored under.

    safetensors' save_model writes a tensor that several modules share once, and the names that it leaves out into the
    metadata, among the metadata of the user.

    Raises:
        ForeignCheckpointError: a name leads to a tensor that is not stored, or there are too many names.
    """
    others = {
        name: stored
        for name, stored in metadata.items()
        if stored in arrays and name not in arrays and name not in _NO_NAMES
    }
    if len(others) > _MAX_OTHER_NAMES:
        raise ForeignCheckpointError(f"{path.name}: its metadata has {len(others)} names of tensors: it is no model's")
    for name, stored in metadata.items():
        if name in arrays or name in others or name in _NO_NAMES:
            continue
        # Nothing writes a name of a name. The metadata of users is seldom two dotted names with the same end.
        if stored in others or (stored not in arrays and "." in name and _ends_alike(name, stored)):
            raise ForeignCheckpointError(
                f"{path.name}: its metadata has {name!r} as another name of {stored!r}, which is no tensor in it: "
                "parts of the model are missing; save the model again"
            )
    return others


def _ends_alike(name: str, stored: str) -> bool:
    return (
        "." in stored and not set(name + stored) & set(" /:") and name.rpartition(".")[2] == stored.rpartition(".")[2]
    )


def _safetensors_dtype(name: str) -> str:
    if name in dtypes.BY_SAFETENSORS:
        return dtypes.BY_SAFETENSORS[name].name
    return NUMPY_DTYPES[name].name if name in NUMPY_DTYPES else name
