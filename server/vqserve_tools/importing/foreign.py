"""Reading of untrusted files (.npy, .npz, .safetensors, torch files) as named arrays.

No pickle is ever run: numpy files are read with allow_pickle=False, torch files with weights_only=True. Every size that
a file claims is compared with the size of its data, or with a limit, before memory is allocated.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import stat
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch

from vqserve import dtypes
from vqserve.errors import ForeignCheckpointError
from vqserve_server.codebooks.safetensors_file import (
    NUMPY_DTYPES,
    ContainerError,
    TensorEntry,
    read_header,
    read_tensor,
)

# Far more than the largest known codebook: 2^18 codes of width 256 are 256 MiB.
MAX_ARRAY_BYTES = 4 << 30
# Name of the only array of a file without names.
UNNAMED = ""
# A header of a .npy file is one line of text.
_MAX_NPY_HEADER_BYTES = 1 << 16
# Members of an archive may unpack to this size; a larger total is allowed up to this compression ratio. Trained numbers
# hardly compress.
_MAX_UNPACKED_BYTES = 64 << 20
_MAX_RATIO = 100
# The pickle of thousands of tensors is below 2 MiB. Each of its bytes can become an object of 64 bytes.
_MAX_PICKLE_BYTES = 16 << 20
# Entries of nested dictionaries. A model has thousands; dictionaries that contain each other can look like billions.
_MAX_ENTRIES = 1 << 17
_MAX_NAME_CHARACTERS = 4096
# Compressions that zipfile unpacks in pieces of limited size. With bzip2 and LZMA a small piece can unpack to any size.
_COMPRESSIONS = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})
# The end of an archive with 64-bit offsets: end record (56 bytes), its locator (20), and the common end record (22).
_ENDS_BYTES = 56 + 20 + 22

_TORCH_SUFFIXES = frozenset({".pt", ".pth", ".ckpt", ".bin", ".th"})
_WRAPPERS = ("state_dict", "model")
_TORCHSCRIPT = (
    "it is a TorchScript program, which is code and is not loaded; where it was made, save its tensors alone: "
    "torch.save(model.state_dict(), 'weights.pt') (Cosmos has no tensors: leave out SRC, and pass --kind fsq --levels)"
)
_LONG_NAME = f"a name in it has more than {_MAX_NAME_CHARACTERS} characters: it is not a model's state dict"
# The object that torch rejects, in the text of its error.
_REJECTED = re.compile(r"GLOBAL (\S+)")


@dataclass(frozen=True)
class ForeignArray:
    """An array in a file that is not read yet.

    Attributes:
        shape: lengths of the axes.
        dtype: name of the element type: "float32", "bfloat16" and so on.
        read: returns the array; a type that numpy lacks comes widened to float32, which is exact.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], npt.NDArray[Any]]


@contextmanager
def open_foreign(path: Path) -> Iterator[Mapping[str, ForeignArray]]:
    """Open a file and yield its arrays by name; they are valid inside the `with`.

    Nested dictionaries give dotted names; values that are not arrays are left out. A `state_dict` or `model` around the
    whole model is removed from the names.

    Raises:
        ForeignCheckpointError: the file cannot be read, or not without trusting it; the error says why in one line.
    """
    suffix = path.suffix.lower()
    readers = {".npy": _open_npy, ".npz": _open_npz, ".safetensors": _open_safetensors}
    reader = _open_torch if suffix in _TORCH_SUFFIXES else readers.get(suffix)
    if suffix == ".jit":
        raise ForeignCheckpointError(f"{path.name}: {_TORCHSCRIPT}")
    if reader is None:
        known = ", ".join([*readers, *sorted(_TORCH_SUFFIXES)])
        raise ForeignCheckpointError(f"{path.name}: files of type {suffix!r} are not read, only {known}")
    try:
        if not path.is_file():
            what = "it is no regular file" if path.exists() else "there is no such file"
            raise ForeignCheckpointError(f"{path.name}: {what}")
        with reader(path) as arrays:
            if max(map(len, arrays), default=0) > _MAX_NAME_CHARACTERS:
                raise ForeignCheckpointError(f"{path.name}: {_LONG_NAME}")
            yield arrays
    except ForeignCheckpointError:
        raise
    except ContainerError as error:
        raise ForeignCheckpointError(f"{path.name}: it {error}") from None
    except MemoryError:
        raise ForeignCheckpointError(f"{path.name}: it claims more memory than this machine has") from None
    except pickle.UnpicklingError as error:
        raise ForeignCheckpointError(f"{path.name}: {_unpickling_text(error)}") from None
    # On a damaged file the parsers of numpy, zipfile and torch raise exceptions of many types.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ForeignCheckpointError(f"{path.name}: it cannot be read: {reason}") from error


@contextmanager
def _open_npy(path: Path) -> Iterator[Mapping[str, ForeignArray]]:
    if zipfile.is_zipfile(path):
        raise ForeignCheckpointError(f"{path.name}: it is a zip archive: name it .npz")
    with path.open("rb") as file:
        shape, dtype = _npy_claims(path.name, file, path.stat().st_size)
        yield {UNNAMED: _numpy_array(path.name, shape, dtype, lambda: _read_npy(file))}


@contextmanager
def _open_npz(path: Path) -> Iterator[Mapping[str, ForeignArray]]:
    with zipfile.ZipFile(path) as archive:
        _check_members(path, archive)
        arrays, taken = {}, Counter[str]()
        for member in archive.infolist():
            if member.filename.endswith(".npy"):
                name = member.filename.removesuffix(".npy")
                arrays[name] = _npz_member(path, archive, member, taken)
        yield arrays


def _npz_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, taken: Counter[str]) -> ForeignArray:
    label = f"{path.name}: {member.filename}"
    # Only the header of the array is unpacked here; the length of the data must match the archive's directory.
    with archive.open(member) as stream:
        shape, dtype = _npy_claims(label, stream, member.file_size)

    def read() -> npt.NDArray[Any]:
        # All members count together: many small members can be a zip bomb too.
        taken.update(unpacked=member.file_size, packed=member.compress_size)
        if taken["unpacked"] > max(_MAX_UNPACKED_BYTES, _MAX_RATIO * taken["packed"]):
            raise ForeignCheckpointError(
                f"{label} would unpack {taken['packed']} bytes to {taken['unpacked']}: no trained codebook compresses "
                "that much (numpy.savez does not compress)"
            )
        with archive.open(member) as stream:
            return _read_npy(stream)

    return _numpy_array(label, shape, dtype, read)


def _check_members(path: Path, archive: zipfile.ZipFile) -> None:
    """Check that members have safe, unique names, are no links, and can be unpacked in pieces.

    Nothing is unpacked to disk, but an archive with names outside its folder is hostile.

    Raises:
        ForeignCheckpointError: a member fails; the error names the first one.
    """
    names = set()
    for member in archive.infolist():
        name = member.filename
        if name.startswith("/") or ".." in name.replace("\\", "/").split("/"):
            raise ForeignCheckpointError(f"{path.name}: its member {name!r} points out of the archive")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise ForeignCheckpointError(f"{path.name}: its member {name!r} is a link, not an array")
        if member.compress_type not in _COMPRESSIONS:
            raise ForeignCheckpointError(
                f"{path.name}: its member {name!r} is compressed by another method than deflate: save it again"
            )
        if name in names:
            raise ForeignCheckpointError(f"{path.name}: it has two members {name!r}")
        names.add(name)


def _npy_claims(label: str, stream: IO[bytes], size: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and type from a .npy header; header and array together must have `size` bytes."""
    try:
        version = np.lib.format.read_magic(stream)
    except ValueError:
        raise ForeignCheckpointError(f"{label} is not a .npy file") from None
    if version not in ((1, 0), (2, 0)):
        raise ForeignCheckpointError(f"{label}: format {version} of .npy is not read")
    start = stream.tell()
    length = int.from_bytes(stream.read(2 if version == (1, 0) else 4), "little")
    if length > _MAX_NPY_HEADER_BYTES:
        # numpy would read the whole header before it checks the length.
        raise ForeignCheckpointError(f"{label} claims a header of {length} bytes: it is no array that numpy wrote")
    stream.seek(start)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    if dtype.hasobject:
        raise ForeignCheckpointError(f"{label} holds Python objects, which are not loaded")
    # The header can claim any size; Python integers do not overflow.
    claimed, held = math.prod(shape) * dtype.itemsize, size - stream.tell()
    # With an axis of length zero the other axes can have any length: numpy warns and fails if it cannot address them.
    if claimed != held or min(shape, default=0) < 0 or max(shape, default=0) >= 1 << 62:
        raise ForeignCheckpointError(f"{label} claims {claimed} bytes for shape {shape} and has {held}")
    return shape, dtype


def _read_npy(stream: IO[bytes]) -> npt.NDArray[Any]:
    stream.seek(0)
    return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))


def _numpy_array(
    label: str, shape: tuple[int, ...], dtype: np.dtype[Any], read: Callable[[], npt.NDArray[Any]]
) -> ForeignArray:
    def checked() -> npt.NDArray[Any]:
        _check_size(label, math.prod(shape) * dtype.itemsize)
        return read()

    return ForeignArray(shape, dtype.name, checked)


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Mapping[str, ForeignArray]]:
    with path.open("rb") as file:

        def reader(name: str, entry: TensorEntry) -> Callable[[], npt.NDArray[Any]]:
            def read() -> npt.NDArray[Any]:
                _check_size(f"{path.name}: {name}", entry.end - entry.begin)
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
def _open_torch(path: Path) -> Iterator[Mapping[str, ForeignArray]]:
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
        _check_members(path, archive)
        for member in archive.infolist():
            # torch ignores the case of member names.
            name = member.filename.rpartition("/")[2].lower()
            if name == "constants.pkl" or "/code/" in member.filename.lower():
                raise ForeignCheckpointError(f"{path.name}: {_TORCHSCRIPT}")
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


def _unpickling_text(error: pickle.UnpicklingError) -> str:
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
        if entries > _MAX_ENTRIES or len(prefix) > _MAX_NAME_CHARACTERS:
            raise ForeignCheckpointError(
                f"{path.name}: its dictionaries contain each other: it is not a model's state dict"
            )
        for name, value in mapping.items():
            # Keys of other types are skipped: their text can have any length.
            if not isinstance(name, (str, int)) or not isinstance(value, (torch.Tensor, Mapping)):
                continue
            if isinstance(name, str) and len(name) > _MAX_NAME_CHARACTERS:
                raise ForeignCheckpointError(f"{path.name}: {_LONG_NAME}")
            if isinstance(value, torch.Tensor):
                yield f"{prefix}{name}", value
            else:
                todo.append((f"{prefix}{name}.", value))


def _torch_array(path: Path, name: str, tensor: torch.Tensor) -> ForeignArray:
    def read() -> npt.NDArray[Any]:
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ForeignCheckpointError(f"{path.name}: {name} is not a dense tensor with values")
        size = tensor.numel() * tensor.element_size()
        _check_size(f"{path.name}: {name}", size)
        # A tensor with strides of zero can claim any size.
        if size > tensor.untyped_storage().nbytes():
            raise ForeignCheckpointError(f"{path.name}: {name} claims {size} bytes, more than the file has for it")
        plain = tensor.detach()
        # Copied, because the mapped file may change or vanish.
        dtype = dtypes.of_torch(plain.dtype)
        return (plain if dtype is None or dtype.coding is None else plain.to(torch.float32)).clone().numpy()

    return ForeignArray(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), read)


def _check_size(label: str, size: int) -> None:
    if size > MAX_ARRAY_BYTES:
        raise ForeignCheckpointError(f"{label} is {size} bytes, more than {MAX_ARRAY_BYTES}")
