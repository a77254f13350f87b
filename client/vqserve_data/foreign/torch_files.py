"""Files of torch.save and torch.jit.save: the names and shapes of their tensors, and their numbers.

torch is not used to read them: its `weights_only` refuses what trainers save beside the weights, and its other way runs
what the file says. The pickle in a file is read by an interpreter that runs nothing (unpickler.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from vqserve import dtypes
from vqserve.errors import ForeignCheckpointError
from vqserve_data.foreign.foreign_array import ForeignArray, check_size
from vqserve_data.foreign.pickled_names import named_tensors
from vqserve_data.foreign.pickled_tensors import PickledTensor, Storage
from vqserve_data.foreign.pickled_values import PickleError, Table, described
from vqserve_data.foreign.torch_containers import Container, open_containers

TORCH_SUFFIXES = frozenset({".pt", ".pth", ".ckpt", ".bin", ".th", ".jit"})


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a torch file that is not read yet.

    Attributes:
        label: what it is called in errors.
        container: the part of the file that it is in.
        tensor: its description.
    """

    label: str
    container: Container
    tensor: PickledTensor

    def read(self) -> npt.NDArray[Any]:
        """Return the tensor; bfloat16 as float32.

        Raises:
            ForeignCheckpointError: it cannot be read, or is too large.
        """
        tensor = self.tensor
        if tensor.source is None:
            raise ForeignCheckpointError(f"{self.label} {tensor.reason}")
        if tensor.item_bytes == 0:
            raise ForeignCheckpointError(f"{self.label} is of type {tensor.dtype}, which is not read")
        check_size(self.label, tensor.size)
        return _read(self.label, self.container, tensor, tensor.source)

    def plain_start(self) -> int | None:
        """Return where in the file its elements lie together, little-endian and in C order; None: they do not."""
        tensor, source = self.tensor, self.tensor.source
        if not isinstance(source, Storage) or self.container.big_endian or not tensor.item_bytes:
            return None
        steps = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
        begin, end = tensor.span
        if list(tensor.strides) != steps or source.start + end > source.stop:
            return None
        return self.container.places[source.key].start + source.start + begin


@contextmanager
def open_torch(path: Path) -> Iterator[Mapping[str, ForeignArray]]:
    """Yield the tensors of a torch file by dotted name."""
    with path.open("rb") as file:
        yield {
            name: ForeignArray(each.tensor.shape, each.tensor.dtype, each.read)
            for name, each in tensors_of(path, file).items()
        }


def tensors_of(path: Path, file: IO[bytes]) -> dict[str, FileTensor]:
    """Return the tensors of an open torch file by dotted name; "" is the name of one that was saved alone.

    Args:
        path: its name, for errors.
        file: the file, which the tensors are read from later.

    Raises:
        ForeignCheckpointError: it is no torch file, is damaged or exceeds a limit.
    """
    try:
        containers = open_containers(path, file)
        tensors = {
            f"{prefix}{name}": FileTensor(f"{path.name}: {f'{prefix}{name}' or 'the tensor'}", container, tensor)
            for prefix, container in containers.items()
            for name, tensor in named_tensors(container.content).items()
        }
    except PickleError as error:
        raise ForeignCheckpointError(f"{path.name}: it {error}") from None
    content = containers[""].content
    if not tensors and not isinstance(content, Table):
        raise ForeignCheckpointError(f"{path.name}: it holds {described(content)}, and no tensors by name")
    return tensors


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
