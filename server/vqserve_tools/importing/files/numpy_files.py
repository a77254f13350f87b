"""Files of numpy: .npy and .npz."""

from __future__ import annotations

import math
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from vqserve.errors import ForeignCheckpointError
from vqserve_data.foreign.archive import check_members
from vqserve_data.foreign.foreign_array import UNNAMED, ForeignArray, check_size
from vqserve_tools.importing.files.recognition import NO_ARRAYS

# A header of a .npy file is one line of text.
_MAX_NPY_HEADER_BYTES = 1 << 16
# Members of an archive may unpack to this size; a larger total is allowed up to this compression ratio. Trained numbers
# hardly compress.
_MAX_UNPACKED_BYTES = 64 << 20
_MAX_RATIO = 100


@contextmanager
def open_npy(path: Path) -> Iterator[Mapping[str, ForeignArray]]:
    """Yield the one array of a .npy file, without a name."""
    with path.open("rb") as file:
        shape, dtype = _npy_claims(path.name, file, path.stat().st_size)
        yield {UNNAMED: _numpy_array(path.name, shape, dtype, lambda: _read_npy(file))}


@contextmanager
def open_npz(path: Path) -> Iterator[Mapping[str, ForeignArray]]:
    """Yield the arrays of a .npz file by name."""
    with zipfile.ZipFile(path) as archive:
        check_members(path, archive)
        arrays, taken = {}, Counter[str]()
        for member in archive.infolist():
            if member.filename.endswith(".npy"):
                name = member.filename.removesuffix(".npy")
                arrays[name] = _npz_member(path, archive, member, taken)
        if not arrays:
            raise ForeignCheckpointError(f"{path.name}: {NO_ARRAYS}")
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
    if stream.tell() + length > size:
        raise ForeignCheckpointError(f"{label} has {size} bytes, and its header needs more: it was cut short")
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
        cut = ": it was cut short" if 0 <= held < claimed else ""
        raise ForeignCheckpointError(f"{label} claims {claimed} bytes for shape {shape} and has {held}{cut}")
    return shape, dtype


def _read_npy(stream: IO[bytes]) -> npt.NDArray[Any]:
    stream.seek(0)
    return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))


def _numpy_array(
    label: str, shape: tuple[int, ...], dtype: np.dtype[Any], read: Callable[[], npt.NDArray[Any]]
) -> ForeignArray:
    def checked() -> npt.NDArray[Any]:
        check_size(label, math.prod(shape) * dtype.itemsize)
        return read()

    return ForeignArray(shape, dtype.name, checked)
