"""The two formats of torch.save: a zip archive, and the older sequence of pickles and numbers.

Both give a description of the tensors, as data, and the places of their numbers in the file, which are checked against
the length of the file before any of them are read.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from vqserve.errors import ForeignCheckpointError
from vqserve_data.foreign.archive import check_directory, check_members, start_of
from vqserve_data.foreign.pickle_machine import MAX_PICKLE_BYTES, Machine
from vqserve_data.foreign.pickled_tensors import Storage, storage_of
from vqserve_data.foreign.pickled_values import PickleCutOff, PickleError
from vqserve_data.foreign.unpickler import load

# What the older format begins with (torch/serialization.py).
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_LENGTH_BYTES = 8
_TAR = slice(257, 262), b"ustar"
_PIECE_BYTES = 1 << 20
_SMALL_BYTES = 64
_ALONE = "where it was made, save its tensors alone: torch.save(model.state_dict(), 'weights.pt')"


@dataclass(frozen=True)
class _Place:
    """Where the numbers of a storage are in the file, in bytes; their checksum (0: it was not computed)."""

    start: int
    size: int
    checksum: int = 0


@dataclass(frozen=True)
class Container:
    """An open torch file.

    Attributes:
        content: what was saved, as data.
        big_endian: byte order of the numbers.
    """

    path: Path
    file: IO[bytes]
    content: object
    places: dict[str, _Place]
    big_endian: bool = False

    def read(self, key: str, begin: int, end: int) -> npt.NDArray[Any]:
        """Return bytes [begin, end) of a storage, uint8.

        Raises:
            ForeignCheckpointError: the file has changed, or the checksum of the whole storage differs.
        """
        place = self.places[key]
        data = np.empty(end - begin, np.uint8)
        # All of it is read for the checksum, in pieces.
        checksum, position, stop = (0, 0, place.size) if place.checksum else (0, begin, end)
        self.file.seek(place.start + position)
        while position < stop:
            piece = self.file.read(min(_PIECE_BYTES, stop - position))
            if not piece:
                raise ForeignCheckpointError(f"{self.path.name}: it ends early")
            checksum = zlib.crc32(piece, checksum)
            low, high = max(begin, position), min(end, position + len(piece))
            if low < high:
                data[low - begin : high - begin] = np.frombuffer(piece, np.uint8)[low - position : high - position]
            position += len(piece)
        if place.checksum not in (0, checksum):
            raise ForeignCheckpointError(
                f"{self.path.name}: it is damaged: the checksum of its numbers {key!r} differs"
            )
        return data


def open_containers(path: Path, file: IO[bytes]) -> dict[str, Container]:
    """Read the descriptions in a torch file; return them by the prefix of their names.

    Raises:
        ForeignCheckpointError: the file is no torch file, or of a format that is not read.
        PickleError: it is damaged, or exceeds a limit.
    """
    if zipfile.is_zipfile(file):
        return _open_archive(path, file)
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(min(length, MAX_PICKLE_BYTES))
    place, tar = _TAR
    if head[place] == tar:
        raise ForeignCheckpointError(
            f"{path.name}: it is in torch's tar format of 2016, which is not read; if you trust it, save it again: "
            "torch.save(torch.load(FILE, weights_only=False), 'weights.pt')"
        )
    return {"": _open_sequence(path, file, head, length)}


# The zip format.


@dataclass(frozen=True)
class _Archive:
    path: Path
    file: IO[bytes]
    members: dict[str, zipfile.ZipInfo]

    @classmethod
    def of(cls, path: Path, file: IO[bytes]) -> _Archive:
        """Read and check the directory of an archive; as in torch, the first member tells the folder of all others."""
        check_directory(path, file)
        with zipfile.ZipFile(file) as archive:
            check_members(path, archive)
            members = archive.infolist()
        folder = f"{members[0].filename.partition('/')[0]}/" if members else ""
        if len({member.filename.lower() for member in members}) < len(members):
            # torch ignores the case of names.
            raise ForeignCheckpointError(f"{path.name}: it has two members whose names differ in case only")
        inside = (member for member in members if member.filename.startswith(folder))
        return cls(path, file, {member.filename.removeprefix(folder): member for member in inside})

    def place(self, name: str) -> _Place | None:
        """Return where a member is; None: there is none."""
        member = self.members.get(name)
        if member is None:
            return None
        if member.compress_type != zipfile.ZIP_STORED:
            raise ForeignCheckpointError(
                f"{self.path.name}: its member {member.filename!r} is compressed, which torch.save never does"
            )
        return _Place(start_of(self.path, self.file, member), member.file_size, member.CRC)

    def read(self, name: str, limit: int) -> bytes | None:
        """Return the bytes of a member, at most `limit`; None: there is none."""
        place = self.place(name)
        if place is None:
            return None
        if place.size > limit:
            raise ForeignCheckpointError(
                f"{self.path.name}: its member {self.members[name].filename!r} has {place.size} bytes, and {limit} at "
                f"most are read; {_ALONE}"
            )
        return Container(self.path, self.file, None, {name: place}).read(name, 0, place.size).tobytes()


def _open_archive(path: Path, file: IO[bytes]) -> dict[str, Container]:
    archive = _Archive.of(path, file)
    order = archive.read("byteorder", _SMALL_BYTES) or b"little"
    if order not in (b"little", b"big"):
        raise ForeignCheckpointError(f"{path.name}: its byte order is neither little nor big")
    description, constants = (archive.read(name, MAX_PICKLE_BYTES) for name in ("data.pkl", "constants.pkl"))
    if description is None:
        raise ForeignCheckpointError(f"{path.name}: its archive has no data.pkl, so torch.save did not write it")

    def container(pickle: bytes, folder: str) -> Container:
        machine = Machine(pickle)
        content = load(machine)
        places = _places(machine, lambda storage: archive.place(f"{folder}/{storage.key}"))
        return Container(path, file, content, places, order == b"big")

    containers = {"": container(description, "data")}
    if constants is not None:
        # The tensors in the code of a TorchScript program, which calls them c0, c1 and so on.
        containers["CONSTANTS.c"] = container(constants, "constants")
    return containers


# The older format: a number, a version, the system, the description, the keys of the storages, the storages.


def _open_sequence(path: Path, file: IO[bytes], head: bytes, length: int) -> Container:
    machine = Machine(head)
    try:
        is_torch = load(machine) == _MAGIC
    except PickleError:
        raise ForeignCheckpointError(f"{path.name}: it is damaged, or torch.save did not write it") from None
    if not is_torch:
        raise ForeignCheckpointError(
            f"{path.name}: it is a pickle that torch.save did not write: save it with torch.save"
        )
    try:
        version, _, content, keys = (load(machine) for _ in range(4))
    except PickleCutOff:
        if length > len(head):
            raise PickleError(
                f"has a description of its tensors of more than {MAX_PICKLE_BYTES} bytes, which are not read; {_ALONE}"
            ) from None
        raise
    if version != _PROTOCOL or not isinstance(keys, list):
        raise PickleError("is damaged, or of another version of torch's format")
    known = {storage.key: storage for storage in _storages(machine).values()}
    places: dict[str, _Place] = {}
    position = machine.position
    for key in keys:
        storage = known.get(key) if isinstance(key, str) else None
        if storage is None or key in places:
            raise PickleError("is damaged: its list of numbers does not match their description")
        file.seek(position)
        size = storage.size
        if (
            int.from_bytes(file.read(_LENGTH_BYTES), "little") != storage.length
            or position + _LENGTH_BYTES + size > length
        ):
            raise PickleCutOff
        places[key] = _Place(position + _LENGTH_BYTES, size)
        position += _LENGTH_BYTES + size
    return Container(path, file, content, _places(machine, lambda storage: places.get(storage.key)))


def _places(machine: Machine, find: Callable[[Storage], _Place | None]) -> dict[str, _Place]:
    """Return the place of each storage that a description refers to.

    Raises:
        PickleError: one is not there, or shorter than described, or two references to one differ.
    """
    places = {}
    for key, storage in _storages(machine).items():
        place = find(storage)
        if place is None or place.size < storage.size:
            held = 0 if place is None else place.size
            raise PickleError(f"is damaged: it has {held} bytes of the numbers {key!r}, of {storage.size} described")
        places[key] = place
    return places


def _storages(machine: Machine) -> dict[str, Storage]:
    storages: dict[str, Storage] = {}
    for reference in machine.persistent_ids:
        storage = storage_of(reference)
        if storage is None:
            continue
        first = storages.setdefault(storage.key, storage)
        if (first.dtype, first.length) != (storage.dtype, storage.length):
            raise PickleError(f"is damaged: it describes the numbers {storage.key!r} in two ways")
    return storages
