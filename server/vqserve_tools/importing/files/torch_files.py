"""Files of torch.save and torch.jit.save: the names and shapes of their tensors, and their numbers.

torch is not used to read them: its `weights_only` refuses what trainers save beside the weights, and its other way runs
what the file says. The pickle in a file is read by an interpreter that runs nothing (unpickler.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vqserve import dtypes
from vqserve.errors import ForeignCheckpointError
from vqserve_tools.importing.files.foreign_array import ForeignArray, check_size
from vqserve_tools.importing.files.pickled_names import named_tensors
from vqserve_tools.importing.files.pickled_tensors import PickledTensor, Storage
from vqserve_tools.importing.files.pickled_values import PickleError, Table, described
from vqserve_tools.importing.files.torch_containers import Container, open_containers

TORCH_SUFFIXES = frozenset({".pt", ".pth", ".ckpt", ".bin", ".th", ".jit"})


@contextmanager
def open_torch(path: Path) -> Iterator[Mapping[str, ForeignArray]]:
    """Yield the tensors of a torch file by dotted name."""
    with path.open("rb") as file:
        try:
            containers = open_containers(path, file)
            arrays = {
                f"{prefix}{name}": _array(path, container, f"{prefix}{name}", tensor)
                for prefix, container in containers.items()
                for name, tensor in named_tensors(container.content).items()
            }
        except PickleError as error:
            raise ForeignCheckpointError(f"{path.name}: it {error}") from None
        content = containers[""].content
        if not arrays and not isinstance(content, Table):
            raise ForeignCheckpointError(f"{path.name}: it holds {described(content)}, and no tensors by name")
        yield arrays


def _array(path: Path, container: Container, name: str, tensor: PickledTensor) -> ForeignArray:
    label = f"{path.name}: {name or 'the tensor'}"

    def read() -> npt.NDArray[Any]:
        if tensor.source is None:
            raise ForeignCheckpointError(f"{label} {tensor.reason}")
        if tensor.item_bytes == 0:
            raise ForeignCheckpointError(f"{label} is of type {tensor.dtype}, which is not read")
        check_size(label, tensor.size)
        return _read(label, container, tensor, tensor.source)

    return ForeignArray(tensor.shape, tensor.dtype, read)


def _read(label: str, container: Container, tensor: PickledTensor, source: Storage | bytes | str) -> npt.NDArray[Any]:
    begin, end = tensor.span
    if isinstance(source, Storage):
        begin, end = begin + source.start, end + source.start
        held = source.stop - source.start
        # A tensor with strides of zero can claim any size.
        if tensor.size > held or end > source.stop:
            claimed = max(tensor.size, end - source.start)
            raise ForeignCheckpointError(f"{label} claims {claimed} bytes, more than the file has for it ({held})")
        check_size(label, end - begin)
        data, big_endian = container.read(source.key, begin, end), container.big_endian
    else:
        data = np.frombuffer(source.encode("latin-1") if isinstance(source, str) else source, np.uint8)
        big_endian = tensor.big_endian
    dtype = dtypes.BY_NAME.get(tensor.dtype)
    element = np.dtype(tensor.dtype) if dtype is None else dtype.storage
    values = data.view(element.newbyteorder(">" if big_endian else "<"))
    strides = tuple(stride * element.itemsize for stride in tensor.strides)
    array = np.lib.stride_tricks.as_strided(values, tensor.shape, strides if values.size else None, writeable=False)
    native = np.ascontiguousarray(array, element.newbyteorder("=")).reshape(tensor.shape)
    return native if dtype is None else dtype.widen(native)
