"""Reading and writing the safetensors container, trusting nothing in it.

The layout is public (https://github.com/huggingface/safetensors): eight bytes with the length of a JSON header, the
header, the tensors' raw little-endian bytes. The safetensors package is not used because it writes the metadata in
a random order, so that the same codebook would not give the same bytes, and because here every claim of a header is
compared with the size of the file before a byte is allocated for it.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from vqserve.dtypes import BY_SAFETENSORS

# Headers of whole models with thousands of tensors stay below 2 MiB.
MAX_HEADER_BYTES = 16 << 20
_MAX_RANK = 8

# Types that numpy lacks come as bit patterns. The last ones are in foreign files only.
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    **{name: dtype.storage for name, dtype in BY_SAFETENSORS.items()},
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "BOOL": np.dtype("?"),
}
_NAMES = {
    dtype: name
    for name, dtype in NUMPY_DTYPES.items()
    if name not in BY_SAFETENSORS or BY_SAFETENSORS[name].coding is None
}


class ContainerError(ValueError):
    """The bytes are no well-formed safetensors file."""


@dataclass(frozen=True)
class TensorEntry:
    """The header's entry of one tensor; `begin` and `end` count bytes from the start of the file.

    Attributes:
        dtype: the name in the file: "F32", "BF16" and so on, also of types that are not read here.
        shape: lengths of the axes.
        begin: where its bytes begin.
        end: where they end.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header: the tensors tile the rest of the file without gap or overlap."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def dtype_name(dtype: np.dtype[Any]) -> str:
    """Return "F32" for float32 and so on.

    Raises:
        KeyError: the type has no name here.
    """
    return _NAMES[dtype.newbyteorder("<")]


def read_header(file: IO[bytes], *, max_header_bytes: int = MAX_HEADER_BYTES) -> Header:
    """Read and check the header of an open file.

    Args:
        file: opened for reading; it can seek.
        max_header_bytes: bounds the memory that a hostile header can make this take.

    Raises:
        ContainerError: says what is malformed.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    prefix = file.read(8)
    if len(prefix) < 8:
        raise ContainerError(f"is {size} bytes long, too short for a safetensors file")
    length = int.from_bytes(prefix, "little")
    if length > min(max_header_bytes, size - 8):
        raise ContainerError(
            f"claims a header of {length} bytes (at most {max_header_bytes} are read) in a file of {size}: "
            "it is truncated or no safetensors file"
        )
    raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:
        raise ContainerError(f"has a header that is not JSON: {_one_line(error)}") from None
    if not isinstance(header, dict):
        raise ContainerError("has a header that is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ContainerError("has metadata that does not map text to text")
    tensors = {name: _entry(name, claim, 8 + length) for name, claim in header.items()}
    _check_tiling(tensors, 8 + length, size)
    return Header(tensors, metadata)


def read_tensor(file: BufferedReader, entry: TensorEntry) -> npt.NDArray[np.generic]:
    """Read one tensor that `read_header` listed; a type that numpy lacks comes as bit patterns.

    Raises:
        ContainerError: the element type is not read here, or the file has become shorter since.
    """
    dtype = NUMPY_DTYPES.get(entry.dtype)
    if dtype is None:
        raise ContainerError(f"has a tensor of type {entry.dtype}, which is not read here")
    try:
        array = np.empty(entry.shape, dtype)
    except ValueError as error:
        # With an axis of length zero the others can have any length; numpy fails if it cannot address them.
        raise ContainerError(f"has a tensor of shape {entry.shape}: {_one_line(error)}") from None
    file.seek(entry.begin)
    if array.nbytes and file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
        raise ContainerError("became shorter while it was read")
    return array


def write_file(path: Path, tensors: Mapping[str, npt.NDArray[np.generic]], metadata: Mapping[str, str]) -> None:
    """Write a file in one step: a reader sees the old file or the whole new one, and so does a machine that lost power.

    The same tensors and metadata give the same bytes: everything is in order, wider elements first so that each
    tensor is aligned.

    Raises:
        OSError: the folder cannot be written.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in names:
        array = tensors[name]
        end = offset + array.nbytes
        header[name] = {"dtype": dtype_name(array.dtype), "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    text += b" " * (-len(text) % 8)

    # Not tempfile: only the owner can read its files, and a server often runs as another user.
    temporary = path.with_name(f".vqserve-{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                file.write(np.ascontiguousarray(tensors[name], tensors[name].dtype.newbyteorder("<")).data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            # The error of a full disk lacks the name of the file.
            error.filename = str(path)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object's entries; for `json.loads`, which would keep the last of two entries of one name.

    Raises:
        ValueError: a name occurs twice.
    """
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _entry(name: str, claim: object, start: int) -> TensorEntry:
    if not isinstance(claim, dict) or set(claim) != {"dtype", "shape", "data_offsets"}:
        raise ContainerError(f"does not give dtype, shape and data_offsets of tensor {name!r}")
    dtype, shape, offsets = claim["dtype"], claim["shape"], claim["data_offsets"]
    if not isinstance(dtype, str) or not _are_sizes(shape) or len(shape) > _MAX_RANK:
        raise ContainerError(f"has a tensor {name!r} of malformed dtype or shape")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ContainerError(f"has a tensor {name!r} with malformed data_offsets")
    begin, end = offsets
    known = NUMPY_DTYPES.get(dtype)
    # Python integers do not overflow: the file can claim any size.
    if known is not None and math.prod(shape) * known.itemsize != end - begin:
        raise ContainerError(f"has a tensor {name!r} of shape {shape} in {end - begin} bytes")
    return TensorEntry(dtype, tuple(shape), start + begin, start + end)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_tiling(tensors: Mapping[str, TensorEntry], start: int, size: int) -> None:
    position = start
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise ContainerError(f"has a gap or an overlap before the bytes of tensor {name!r}")
        position = entry.end
    if position != size:
        raise ContainerError(f"should be {position} bytes long and is {size}: it was cut short or added to")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
