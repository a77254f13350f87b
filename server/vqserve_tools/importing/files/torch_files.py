"""Files of torch.save, in the zip format and in the older one."""

from __future__ import annotations

import io
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from vqserve import dtypes
from vqserve.errors import ForeignCheckpointError
from vqserve_tools.importing.files.archive import check_members
from vqserve_tools.importing.files.foreign_array import (
    LONG_NAME,
    MAX_NAME_CHARACTERS,
    UNNAMED,
    ForeignArray,
    check_size,
)

# The pickle of thousands of tensors is below 2 MiB. Each of its bytes can become an object of 64 bytes.
_MAX_PICKLE_BYTES = 16 << 20
# Entries of nested dictionaries. A model has thousands; dictionaries that contain each other can look like billions.
_MAX_ENTRIES = 1 << 17
# The end of an archive with 64-bit offsets: end record (56 bytes), its locator (20), and the common end record (22).
_ENDS_BYTES = 56 + 20 + 22

TORCH_SUFFIXES = frozenset({".pt", ".pth", ".ckpt", ".bin", ".th"})
_WRAPPERS = ("state_dict", "model")
TORCHSCRIPT = (
    "it is a TorchScript program, which is code and is not loaded; where it was made, save its tensors alone: "
    "torch.save(model.state_dict(), 'weights.pt') (Cosmos has no tensors: leave out SRC, and pass --kind fsq --levels)"
)
# The object that torch rejects, in the text of its error.
_REJECTED = re.compile(r"GLOBAL (\S+)")


class _OlderTorchFile(io.BufferedReader):
    """A file of torch's older format, which does not give the lengths of the pickles between its tensors.

    torch reads pickles by `read` and `readline`, which are limited here, and tensors by other means.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._path = path
        self._left = _MAX_PICKLE_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        return self._counted(super().read(size))

    def readline(self, size: int | None = -1, /) -> bytes:
        return self._counted(super().readline(size))

    def _counted(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise ForeignCheckpointError(
                f"{self._path.name}: its description has more bytes than the description of any model "
                f"({_MAX_PICKLE_BYTES})"
            )
        return data


@contextmanager
def open_torch(path: Path) -> Iterator[Mapping[str, ForeignArray]]:
    """Yield the tensors of a torch file by dotted name."""
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_torch_archive(path)
    # Only the zip format can be memory-mapped; the older format is read at once.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if is_zip:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        else:
            with _OlderTorchFile(path) as file:
                content = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(content, torch.Tensor):
        yield {UNNAMED: _torch_array(path, "the tensor", content)}
        return
    if not isinstance(content, Mapping):
        raise ForeignCheckpointError(f"{path.name}: it holds a {type(content).__name__}, not tensors by name")
    arrays: dict[str, ForeignArray] = {}
    for name, tensor in _flatten(path, _unwrap(path, content)):
        if name in arrays:
            raise ForeignCheckpointError(f"{path.name}: it has two tensors {name!r}")
        arrays[name] = _torch_array(path, name, tensor)
    yield arrays


def _check_torch_archive(path: Path) -> None:
    """Check that torch.save can have written an archive, before torch unpacks any of it.

    Raises:
        ForeignCheckpointError: the archive is a program, has a compressed member, or a pickle larger than any model's.
    """
    with zipfile.ZipFile(path) as archive:
        _check_directory(path)
        check_members(path, archive)
        for member in archive.infolist():
            # torch ignores the case of member names.
            name = member.filename.rpartition("/")[2].lower()
            if name == "constants.pkl" or "/code/" in member.filename.lower():
                raise ForeignCheckpointError(f"{path.name}: {TORCHSCRIPT}")
            if member.compress_type != zipfile.ZIP_STORED:
                raise ForeignCheckpointError(
                    f"{path.name}: its member {member.filename!r} is compressed, which torch.save never does"
                )
            if name.endswith(".pkl") and member.file_size > _MAX_PICKLE_BYTES:
                raise ForeignCheckpointError(
                    f"{path.name}: its member {member.filename!r} has {member.file_size} bytes, more than the "
                    f"description of any model ({_MAX_PICKLE_BYTES})"
                )


def _check_directory(path: Path) -> None:
    """Check that torch finds the same directory of an archive as zipfile, because zipfile checked the members.

    torch uses the offset in the end record; zipfile uses the directory directly before the end record.

    Raises:
        ForeignCheckpointError: the two directories differ, or data follows the end record.
    """
    with path.open("rb") as file:
        length = file.seek(0, io.SEEK_END)
        file.seek(max(length - _ENDS_BYTES, 0))
        tail = file.read()
    end, locator, wide = tail[-22:], tail[-42:-22], tail[-_ENDS_BYTES:-42]
    is_plain = end.startswith(b"PK\5\6") and end.endswith(b"\0\0")
    if locator.startswith(b"PK\6\7"):
        [place] = struct.unpack("<Q", locator[8:16])
        is_plain = is_plain and wide.startswith(b"PK\6\6") and place == length - _ENDS_BYTES
        size, offset, behind = *struct.unpack("<QQ", wide[40:56]), _ENDS_BYTES
    else:
        size, offset, behind = *struct.unpack("<II", end[12:20]), len(end)
    if not is_plain or offset + size != length - behind:
        raise ForeignCheckpointError(f"{path.name}: its archive is not as torch.save writes it: save it again")


def unpickling_text(error: pickle.UnpicklingError) -> str:
    """Return what a file is that torch does not read."""
    rejected = _REJECTED.search(str(error))
    if rejected is None:
        return "it is damaged, or torch.save did not write it"
    return (
        f"it holds Python objects ({rejected[1][:100]}) beside tensors, which could run code when loaded; where it was "
        "made, load it and save its tensors alone: torch.save(model.state_dict(), 'weights.pt')"
    )


def _unwrap(path: Path, content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    # Names stay complete if the wrapper is ambiguous: beside tensors, with both wrappers, or beside another copy of the
    # same model, such as its moving average.
    inner = [name for name in _WRAPPERS if isinstance(content.get(name), Mapping)]
    if len(inner) != 1 or any(isinstance(value, torch.Tensor) for value in content.values()):
        return content
    model = content[inner[0]]
    others = {name: value for name, value in content.items() if name != inner[0] and isinstance(value, Mapping)}
    # The copy may have more wrappers than the model.
    if any(ending in model for name, _ in _flatten(path, others) for ending in _endings(name)):
        return content
    return _unwrap(path, model)


def _endings(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.partition(".")[2]


def _flatten(path: Path, content: Mapping[Any, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of nested dictionaries with dotted names.

    Raises:
        ForeignCheckpointError: the dictionaries contain each other, so that their entries never end or nearly so.
    """
    todo: list[tuple[str, Mapping[Any, Any]]] = [("", content)]
    entries = 0
    while todo:
        prefix, mapping = todo.pop()
        entries += len(mapping)
        if entries > _MAX_ENTRIES or len(prefix) > MAX_NAME_CHARACTERS:
            raise ForeignCheckpointError(
                f"{path.name}: its dictionaries contain each other: it is not a model's state dict"
            )
        for name, value in mapping.items():
            # Keys of other types are skipped: their text can have any length.
            if not isinstance(name, (str, int)) or not isinstance(value, (torch.Tensor, Mapping)):
                continue
            if isinstance(name, str) and len(name) > MAX_NAME_CHARACTERS:
                raise ForeignCheckpointError(f"{path.name}: {LONG_NAME}")
            if isinstance(value, torch.Tensor):
                yield f"{prefix}{name}", value
            else:
                todo.append((f"{prefix}{name}.", value))


def _torch_array(path: Path, name: str, tensor: torch.Tensor) -> ForeignArray:
    def read() -> npt.NDArray[Any]:
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ForeignCheckpointError(f"{path.name}: {name} is not a dense tensor with values")
        size = tensor.numel() * tensor.element_size()
        check_size(f"{path.name}: {name}", size)
        # A tensor with strides of zero can claim any size.
        if size > tensor.untyped_storage().nbytes():
            raise ForeignCheckpointError(f"{path.name}: {name} claims {size} bytes, more than the file has for it")
        plain = tensor.detach()
        # Copied, because the mapped file may change or vanish.
        dtype = dtypes.of_torch(plain.dtype)
        return (plain if dtype is None or dtype.coding is None else plain.to(torch.float32)).clone().numpy()

    return ForeignArray(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), read)
