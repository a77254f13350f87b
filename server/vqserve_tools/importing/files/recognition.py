"""What a file is, by its first bytes: a format that is read here, or something else, which the error says.

The names of files are not reliable: downloads save an error page under the name of the weights, and safetensors files
are named .bin.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from enum import Enum
from pathlib import Path

from vqserve.errors import ForeignCheckpointError
from vqserve.safetensors_file import MAX_HEADER_BYTES

_HEAD_BYTES = 2048
# A tar archive has headers at multiples of this; the first one may be of further attributes of the second one.
_TAR_BYTES = 512
_NPY, _ZIP = b"\x93NUMPY", b"PK\x03\x04"
# torch.save's older format begins with the pickle of this number.
_OLDER_TORCH = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
# What torch.save and torch.jit.save write first into an archive.
_TORCH_MEMBERS = frozenset({b"data.pkl", b"constants.pkl", b"version", b"byteorder", b".format_version"})
# The members of torch.save's format of 2016, a tar archive, which torch's reader names.
_TORCH_TAR = (b"sys_info\0", b"pickle\0", b"storages\0", b"tensors\0")
# The end of a table of LevelDB, which TensorFlow's index of a checkpoint is.
_TABLE_END = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"

_DOWNLOAD = "download it again"
_NUMPY = "where it was made, save the codebook's array with numpy.save, and import that"
_TENSORFLOW = f"it is part of a TensorFlow checkpoint: read it with tf.train.load_checkpoint; {_NUMPY}"
_FLAX = f"it is a MessagePack file of Flax: read it with flax.serialization.msgpack_restore; {_NUMPY}"
NO_ARRAYS = "it is a zip archive without arrays: unpack it, and import the file in it"
_ONNX = f"it is an ONNX model: its arrays are initializers in onnx.load(...).graph; {_NUMPY}"

# The first bytes of files, and what they are.
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs.github.com/spec/",
        "it is a git-LFS pointer, a text that stands for the weights: run `git lfs pull` in its repository, or "
        "download the file itself",
    ),
    (b"\x1f\x8b", "it is compressed by gzip: unpack it with gunzip or tar, and import the file in it"),
    (b"\x28\xb5\x2f\xfd", "it is compressed by zstd: unpack it with unzstd, and import the file in it"),
    (b"BZh", "it is compressed by bzip2: unpack it with bunzip2, and import the file in it"),
    (b"\xfd7zXZ\x00", "it is compressed by xz: unpack it with unxz, and import the file in it"),
    (b"7z\xbc\xaf\x27\x1c", "it is a 7z archive: unpack it, and import the file in it"),
    (b"Rar!\x1a\x07", "it is a RAR archive: unpack it, and import the file in it"),
    (b"GGUF", "it is a GGUF file, whose arrays may be quantized: import the checkpoint that it was converted from"),
    (b"\x89HDF\r\n\x1a\n", f"it is an HDF5 file (Keras, h5py): {_NUMPY}"),
    (b"PK\x05\x06", "it is a zip archive without members"),
)
# By suffix, for files that have no distinctive first bytes.
_SUFFIXES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.(index|meta|data-\d+-of-\d+)"), _TENSORFLOW),
    (re.compile(r"\.msgpack"), _FLAX),
    (re.compile(r"\.onnx"), _ONNX),
    (re.compile(r"\.(pb|tflite)"), f"it is a TensorFlow graph: {_NUMPY}"),
)
_PAGE = re.compile(rb"\s*(\xef\xbb\xbf)?\s*<(!doctype|html|head|body|\?xml|error|script|!--)", re.IGNORECASE)
_JSON = re.compile(rb"\s*(\xef\xbb\xbf)?\s*[\[{]\s*[\"\]}\[{]")
# A sentence such as "Entry not found", but no numbers, and not the text of a pickle.
_SENTENCE = re.compile(rb"[A-Za-z0-9][ -~]{0,400}? [A-Za-z][ -~]*")
_SENTENCE_BYTES = 4096


class Format(Enum):
    """A format of files that is read."""

    NPY = "npy"
    NPZ = "npz"
    SAFETENSORS = "safetensors"
    TORCH = "torch"


def format_of(path: Path) -> Format | None:
    """Return the format of a file by its content; None if the content leaves it to the suffix.

    Raises:
        ForeignCheckpointError: the file is something that is not read; the error says what it is and what to do.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        file.seek(max(size - len(_TABLE_END), 0))
        tail = file.read(len(_TABLE_END))
    if not head:
        raise ForeignCheckpointError(f"{path.name}: it is empty (0 bytes): {_DOWNLOAD}")
    if head.startswith(_NPY):
        return Format.NPY
    if head.startswith(_OLDER_TORCH):
        return Format.TORCH
    if head.startswith(_ZIP):
        return _archive_format(path, head)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES:
        return Format.SAFETENSORS
    what = _what(path, head, tail, size)
    if what:
        raise ForeignCheckpointError(f"{path.name}: {what}")
    return None


def _archive_format(path: Path, head: bytes) -> Format | None:
    """Return the format of a zip archive, by the name of its first member; None if that has another name.

    The directory of the archive is left to the reader of the format, which bounds its size.

    Raises:
        ForeignCheckpointError: the end of the archive is missing.
    """
    if not zipfile.is_zipfile(path):
        raise ForeignCheckpointError(
            f"{path.name}: it is a zip archive (numpy.savez, torch.save) that was cut short at {path.stat().st_size} "
            f"bytes: {_DOWNLOAD}"
        )
    length = int.from_bytes(head[26:28], "little")
    # torch ignores the case of member names.
    name = head[30 : 30 + length].lower()
    if name.endswith(b".npy"):
        return Format.NPZ
    return Format.TORCH if name.rpartition(b"/")[2] in _TORCH_MEMBERS else None


def _what(path: Path, head: bytes, tail: bytes, size: int) -> str:
    """Return what a file is that is not read, or "" if that is not known."""
    found = [
        *(what for beginning, what in _BEGINNINGS if head.startswith(beginning)),
        *(what for is_it, what in _LOOKS if is_it(head)),
        *([_TENSORFLOW] if tail == _TABLE_END else []),
    ]
    line = head.partition(b"\n")[0].rstrip()
    if not found and size <= _SENTENCE_BYTES and _SENTENCE.fullmatch(line):
        found.append(f"it is text ({line[:60].decode('ascii')!r}), not weights: {_DOWNLOAD}")
    found += [what for suffix, what in _SUFFIXES if suffix.fullmatch(path.suffix.lower())]
    return found[0] if found else ""


def _is_tar(head: bytes) -> bool:
    names = [head[place:] for place in range(0, len(head), _TAR_BYTES)]
    return head[257:262] == b"ustar" and not any(name.startswith(_TORCH_TAR) for name in names)


def _is_onnx(head: bytes) -> bool:
    """Return whether a file begins with the version of ONNX's format and the name of a producer."""
    return len(head) > 4 and head[0] == 8 and head[1] <= 32 and head[2] == 18 and 0 < head[3] < 64


def _is_msgpack(head: bytes) -> bool:
    """Return whether a file begins with a map whose first key is text; a pickle begins with an empty map."""
    sizes = {0xDE: 2, 0xDF: 4}
    first = head[0]
    key = head[1 + sizes.get(first, 0) :][:1]
    return (first in sizes or 0x81 <= first <= 0x8F) and (b"\xa0" < key < b"\xc0" or key == b"\xd9")


# How other files look.
_LOOKS: tuple[tuple[Callable[[bytes], object], str], ...] = (
    (_is_tar, "it is a tar archive: unpack it, and import the file in it"),
    (_is_onnx, _ONNX),
    (_is_msgpack, _FLAX),
    (
        _PAGE.match,
        f"it is a web page (HTML or XML), not weights, which a download saves when it needs a login: {_DOWNLOAD}",
    ),
    (
        _JSON.match,
        "it is JSON, not weights: a configuration, or the error of a download; name the file with the weights, an "
        "index such as model.safetensors.index.json, or the folder",
    ),
)
