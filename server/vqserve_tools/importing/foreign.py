"""Foreign containers (.npy, .npz, .safetensors, torch's) as named arrays, read without running or trusting them.

No pickle is ever run: numpy's files are read with allow_pickle=False and torch's with weights_only=True. Whatever a
file claims is compared with what it holds, or with a limit, before memory is taken for it.
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
from vqserve_server.codebooks.safetensors_file import (
    NUMPY_DTYPES,
    ContainerError,
    TensorEntry,
    read_header,
    read_tensor,
)
from vqserve_server.errors import ForeignCheckpointError

# Four times the largest codebook that is known (2^18 codes of width 256 are 256 MiB), with room for a wider one.
MAX_ARRAY_BYTES = 4 << 30
# The name of the only array of a file that names none.
UNNAMED = ""
# A header of numpy's is a line of text.
_MAX_NPY_HEADER_BYTES = 1 << 16
# What parts of an archive may unpack to; beyond it they must be as large as a hundredth of what they become. Trained
# numbers hardly shrink at all.
_MAX_UNPACKED_BYTES = 64 << 20
_MAX_RATIO = 100
# torch's description of thousands of tensors stays below 2 MiB. Read, each byte can become an object of 64.
_MAX_PICKLE_BYTES = 16 << 20
# Entries of nested dictionaries: a model has thousands, and a few that hold each other can pretend to be billions.
_MAX_ENTRIES = 1 << 17
_MAX_NAME_CHARACTERS = 4096
# What zipfile unpacks in pieces. Of bzip2 and LZMA it unpacks a whole piece of the file at once, whatever that becomes.
_COMPRESSIONS = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})
# What ends an archive with 64-bit offsets: its end record of 56 bytes, where that is in 20, and the 22 that all have.
_ENDS_BYTES = 56 + 20 + 22

_TORCH_SUFFIXES = frozenset({".pt", ".pth", ".ckpt", ".bin", ".th"})
_WRAPPERS = ("state_dict", "model")
_TORCHSCRIPT = (
    "it is a TorchScript program, which is code and is not loaded; where it was made, save its tensors alone: "
    "torch.save(model.state_dict(), 'weights.pt') (Cosmos has none to save: leave SRC out and pass --kind fsq --levels)"
)
_LONG_NAME = f"a name in it has more than {_MAX_NAME_CHARACTERS} characters: it is no model's state dict"
# How torch names the object that it refuses.
_REFUSED = re.compile(r"GLOBAL (\S+)")


@dataclass(frozen=True)
class ForeignArray:
    """An array in a file, not read yet.

    Attributes:
        shape: lengths of the axes.
        dtype: the element type's name: "float32", "bfloat16" and so on.
        read: returns the array; a type that numpy lacks comes widened to float32, which is exact.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], npt.NDArray[Any]]


@contextmanager
def open_foreign(path: Path) -> Iterator[Mapping[str, ForeignArray]]:
    """Open a file and give its arrays by name, valid inside the `with`.

    Nested dictionaries give dotted names; what is no array is left out. One `state_dict` or `model` around everything
    that matters is taken off.

    Raises:
        ForeignCheckpointError: the file cannot be read without trusting it, or not at all; one line that says why.
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
        raise ForeignCheckpointError(f"{path.name}: {_refusal(error)}") from None
    # The parsers of numpy, zipfile and torch raise what they like on a damaged file.
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
    # Only the array's header is unpacked here. What follows it must be as long as the directory says.
    with archive.open(member) as stream:
        shape, dtype = _npy_claims(label, stream, member.file_size)

    def read() -> npt.NDArray[Any]:
        # Together: very many small ones are a bomb too.
        taken.update(unpacked=member.file_size, packed=member.compress_size)
        if taken["unpacked"] > max(_MAX_UNPACKED_BYTES, _MAX_RATIO * taken["packed"]):
            raise ForeignCheckpointError(
                f"{label} would unpack {taken['packed']} bytes to {taken['unpacked']}: no trained codebook shrinks so "
                "much (numpy.savez keeps it as it is)"
            )
        with archive.open(member) as stream:
            return _read_npy(stream)

    return _numpy_array(label, shape, dtype, read)


def _check_members(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse names that would leave a folder, links, and members that cannot be unpacked piece by piece.

    Nothing is unpacked to disk, but whoever made such names is hostile.

    Raises:
        ForeignCheckpointError: names the first.
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
    """Return shape and type from a .npy header, which must be those of an array that fills `size` bytes with it."""
    try:
        version = np.lib.format.read_magic(stream)
    except ValueError:
        raise ForeignCheckpointError(f"{label} is not a .npy file") from None
    if version not in ((1, 0), (2, 0)):
        raise ForeignCheckpointError(f"{label}: format {version} of .npy is not read")
    start = stream.tell()
    length = int.from_bytes(stream.read(2 if version == (1, 0) else 4), "little")
    if length > _MAX_NPY_HEADER_BYTES:
        # numpy would read it whole before it looked at its length.
        raise ForeignCheckpointError(f"{label} claims a header of {length} bytes: it is no array that numpy wrote")
    stream.seek(start)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    if dtype.hasobject:
        raise ForeignCheckpointError(f"{label} holds Python objects, which are not loaded")
    # Python's integers cannot overflow, whatever the header claims.
    claimed, held = math.prod(shape) * dtype.itemsize, size - stream.tell()
    # An axis of zero lets the others be as long as they like: numpy refuses what it cannot address, with a warning.
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
            # Its arguments are in its metadata, which an import would leave behind.
            raise ForeignCheckpointError(f"{path.name}: it is a codebook file of vqserve already: serve it as it is")
        yield {
            name: ForeignArray(entry.shape, _safetensors_dtype(entry.dtype), reader(name, entry))
            for name, entry in header.tensors.items()
        }


def _safetensors_dtype(name: str) -> str:
    if name in dtypes.BY_SAFETENSORS:
        return dtypes.BY_SAFETENSORS[name].name
    return NUMPY_DTYPES[name].name if name in NUMPY_DTYPES else name


class _OlderTorchFile(io.BufferedReader):
    """A file of torch's older format, whose description is between tensors and of no length that it says.

    Descriptions are read by `read` and `readline`, tensors past them.
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
                f"{self._path.name}: its description has more bytes than that of any model ({_MAX_PICKLE_BYTES})"
            )
        return data


@contextmanager
def _open_torch(path: Path) -> Iterator[Mapping[str, ForeignArray]]:
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_torch_archive(path)
    # Only the zip format can be mapped; the older one is read at once.
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
    """Refuse an archive that torch.save cannot have written, before torch unpacks any of it.

    Raises:
        ForeignCheckpointError: a program, a compressed member, or a description of a size that no model has.
    """
    with zipfile.ZipFile(path) as archive:
        _check_directory(path)
        _check_members(path, archive)
        for member in archive.infolist():
            # torch finds a member whatever its case.
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
    """Refuse an archive in which torch could find another directory than zipfile, whose members nobody has checked.

    torch goes where the end of the file says, zipfile to what is right in front of that end.

    Raises:
        ForeignCheckpointError: the two places differ, or something follows the end.
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


def _refusal(error: pickle.UnpicklingError) -> str:
    refused = _REFUSED.search(str(error))
    if refused is None:
        return "it is damaged, or no file that torch.save wrote"
    return (
        f"it holds Python objects ({refused[1][:100]}) beside tensors, which could run code when loaded; where it was "
        "made, load it and save its tensors alone: torch.save(model.state_dict(), 'weights.pt')"
    )


def _unwrap(path: Path, content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    # Where there is a choice the names keep their full length: with tensors beside it, with both wrappers, or with
    # another copy of the same model, such as its moving average.
    inner = [name for name in _WRAPPERS if isinstance(content.get(name), Mapping)]
    if len(inner) != 1 or any(isinstance(value, torch.Tensor) for value in content.values()):
        return content
    model = content[inner[0]]
    others = {name: value for name, value in content.items() if name != inner[0] and isinstance(value, Mapping)}
    # The copy may be wrapped more deeply than the model is.
    if any(ending in model for name, _ in _flatten(path, others) for ending in _endings(name)):
        return content
    return _unwrap(path, model)


def _endings(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.partition(".")[2]


def _flatten(path: Path, content: Mapping[Any, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Give the tensors of nested dictionaries by dotted names.

    Raises:
        ForeignCheckpointError: they are nested so that they never end, or nearly.
    """
    todo: list[tuple[str, Mapping[Any, Any]]] = [("", content)]
    entries = 0
    while todo:
        prefix, mapping = todo.pop()
        entries += len(mapping)
        if entries > _MAX_ENTRIES or len(prefix) > _MAX_NAME_CHARACTERS:
            raise ForeignCheckpointError(f"{path.name}: its dictionaries hold each other: it is no model's state dict")
        for name, value in mapping.items():
            # Of any other key the text may be of any length, and so may a number's.
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
        # With strides of zero a tensor can claim any size.
        if size > tensor.untyped_storage().nbytes():
            raise ForeignCheckpointError(f"{path.name}: {name} claims {size} bytes, more than the file has for it")
        plain = tensor.detach()
        # Copied out of the mapped file, which may change or vanish.
        dtype = dtypes.of_torch(plain.dtype)
        return (plain if dtype is None or dtype.coding is None else plain.to(torch.float32)).clone().numpy()

    return ForeignArray(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), read)


def _check_size(label: str, size: int) -> None:
    if size > MAX_ARRAY_BYTES:
        raise ForeignCheckpointError(f"{label} is {size} bytes, more than {MAX_ARRAY_BYTES}")
