"""Codebook files: a quantizer on disk, written in one step and read with everything checked (docs/codebooks.md)."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from vqserve.errors import CodebookError, CodebookFileError, escape
from vqserve.safetensors_file import ContainerError, read_header, read_tensor, unique_names, write_file
from vqserve_server.code_groups import CodeGroups
from vqserve_server.codebook_files import NAME, SUFFIX
from vqserve_server.codebooks.kinds import KINDS
from vqserve_server.codebooks.state import CodebookState, StateError, canonical_json
from vqserve_server.codebooks.statistics import ENTRY, USAGE, Statistics, check_claim, code_groups

if TYPE_CHECKING:
    from vqserve_server.quantizers import Quantizer

# A file with statistics has format 2, so that older servers reject it with a clear text; all others have format 1.
_FORMAT, _FORMAT_WITH_STATISTICS = "1", "2"
_PREFIX = "vqserve."
_KEYS = ("format", "kind", "arguments", "digest", "provenance")
# A codebook has a handful of tensors and a page of provenance.
_MAX_HEADER_BYTES = 1 << 20
_MAX_PROVENANCE_BYTES = 1 << 18
# How files begin that codebooks come in, too. What is read as the length of a header is then more than a codebook's.
_FOREIGN = {
    b"\x93NUMPY": "a .npy file",
    b"PK\x03\x04": "a torch file",
    # A pickle, as torch wrote it until 1.6.
    b"\x80\x02\x8a\x0a": "a torch file",
}
_IMPORT = "not a codebook file: `vqserved import --help` shows how to make one from it"


@dataclass(frozen=True)
class Codebook:
    """A codebook file as it was read.

    Attributes:
        state: kind, arguments of the quantizer's constructor, and tensors.
        digest: lower-case hexadecimal SHA-256 of what encode and decode read.
        provenance: origin of the codebook, as its writer gave it; it has no effect.
        statistics: figures of the codebook on some latents, to compare others with; None: there are none.
    """

    state: CodebookState = field(repr=False)
    digest: str
    provenance: Mapping[str, object] = field(default_factory=dict)
    statistics: Statistics | None = field(default=None, repr=False)

    @property
    def kind(self) -> str:
        """A key of `KINDS`: "vq", "ema" and so on."""
        return self.state.kind

    @property
    def arguments(self) -> Mapping[str, object]:
        """The arguments of the quantizer's constructor."""
        return self.state.arguments

    @cached_property
    def quantizer(self) -> Quantizer:
        """The quantizer, on the CPU, in eval mode and in the memory of `state`; torch is imported for it."""
        return self.state.build(shares_memory=True)

    @property
    def code_groups(self) -> CodeGroups:
        """The counters of the indices that encode gives."""
        count = self.state.num_plain_indices
        return code_groups(self.quantizer) if count is None else CodeGroups((count,))


def codebook_digest(quantizer: Quantizer) -> str:
    """Return the digest that a file of this quantizer has.

    Raises:
        CodebookError: a file cannot hold the quantizer.
    """
    return CodebookState.of(quantizer).digest()


def save_codebook(
    quantizer: Quantizer,
    path: str | Path,
    *,
    provenance: Mapping[str, object] | None = None,
    statistics: Statistics | None = None,
) -> str:
    """Write a quantizer as a codebook file, in one step: a reader sees the old file or the whole new one.

    The same quantizer, provenance and statistics give the same bytes.

    Args:
        quantizer: of a kind that files hold, on any device, float32 or float64.
        path: the file, by custom with the ending ".safetensors"; one that is there is replaced.
        provenance: where the codebook comes from; what JSON can hold. It does not change the digest.
        statistics: figures of the codebook on some latents. They do not change the digest either.

    Returns:
        The digest.

    Raises:
        CodebookError: the quantizer or the provenance cannot be kept in a file.
        OSError: the file cannot be written.
    """
    return save_state(CodebookState.of(quantizer), path, provenance=provenance, statistics=statistics)


def save_state(
    state: CodebookState,
    path: str | Path,
    *,
    provenance: Mapping[str, object] | None = None,
    statistics: Statistics | None = None,
) -> str:
    """Write a quantizer's state as a codebook file; see `save_codebook`.

    Raises:
        CodebookError: the provenance cannot be kept in a file.
        OSError: the file cannot be written.
    """
    try:
        story = canonical_json(dict(provenance or {}))
    except (TypeError, ValueError) as error:
        raise CodebookError(f"provenance must be what JSON can hold: {error}") from None
    if len(story) > _MAX_PROVENANCE_BYTES:
        raise CodebookError(f"provenance is {len(story)} bytes, more than {_MAX_PROVENANCE_BYTES}")
    digest = state.digest()
    metadata = {
        "vqserve.format": _FORMAT,
        "vqserve.kind": state.kind,
        "vqserve.arguments": canonical_json(state.written_arguments()),
        # Only the digest reveals a flipped bit in a weight.
        "vqserve.digest": digest,
        "vqserve.provenance": story,
    }
    tensors = dict(state.tensors)
    if statistics is not None:
        metadata |= {"vqserve.format": _FORMAT_WITH_STATISTICS, _PREFIX + ENTRY: statistics.written(digest)}
        tensors[USAGE] = statistics.usage
    write_file(Path(path), tensors, metadata)
    return digest


def is_codebook_file(path: Path) -> bool:
    """Return whether a file says that it is a codebook file, as opposed to a safetensors file of something else."""
    try:
        with path.open("rb") as file:
            return f"{_PREFIX}format" in read_header(file, max_header_bytes=_MAX_HEADER_BYTES).metadata
    except (OSError, ContainerError):
        return False


def load_codebook(path: str | Path) -> Codebook:
    """Read a codebook file; nothing in it is trusted, and memory is bounded by a few times its length.

    Raises:
        CodebookFileError: says what is wrong and what to do; its `path` is the file.
    """
    path = Path(path)
    try:
        # Opening a pipe would wait for a writer.
        if path.exists() and not path.is_file():
            what = "a folder" if path.is_dir() else "no regular file"
            raise CodebookFileError(f"it is {what}: name a {SUFFIX} file")
        with path.open("rb") as file:
            _check_is_ours(file, path)
            return _read(file)
    except CodebookFileError as error:
        raise error.with_fields(path=str(path)) from None
    except FileNotFoundError:
        raise CodebookFileError("there is no such file", path=path) from None
    except OSError as error:
        raise CodebookFileError(f"it cannot be read: {error.strerror or error}", path=path) from None
    except (ContainerError, StateError) as error:
        what = escape(f"it {error}" if isinstance(error, ContainerError) else str(error))
        text = f"the codebook cannot be used: {what}; copy the file again or make it anew with `vqserved import`"
        raise CodebookFileError(text, path=path) from None


def _check_is_ours(file: BufferedReader, path: Path) -> None:
    """Check that a file is not of another known format.

    Raises:
        CodebookFileError: it is; the error gives the format, and how to make a codebook from it.
    """
    begin = file.read(8)
    what = next((what for magic, what in _FOREIGN.items() if begin.startswith(magic)), None)
    if what == "a .npy file" and path.suffix == ".npy":
        stem = path.stem if NAME.fullmatch(path.stem) else "codebook"
        command = f"vqserved import {shlex.quote(str(path))} -o {stem}{SUFFIX} --metric l2"
        raise CodebookFileError(
            f"it is {what}, not a codebook file: `{escape(command)}`, or with the model's other metric, makes one"
        )
    if what is not None:
        raise CodebookFileError(f"it is {'an .npz file' if path.suffix == '.npz' else what}, {_IMPORT}")
    if len(begin) == 8 and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in begin):
        raise CodebookFileError(f"it is a text file, not a codebook file: name a {SUFFIX} file")


def _read(file: BufferedReader) -> Codebook:
    header = read_header(file, max_header_bytes=_MAX_HEADER_BYTES)
    entries = _entries(header.metadata)
    kind = entries["kind"]
    if kind not in KINDS:
        raise StateError(f"it is of unknown kind {kind[:40]!r}, not one of {', '.join(KINDS)}")
    arguments, provenance = (_json_object(name, entries[name]) for name in ("arguments", "provenance"))

    def read(name: str) -> npt.NDArray[Any]:
        array = read_tensor(file, header.tensors[name])
        return array.astype(array.dtype.newbyteorder("="), copy=False)

    # All names, types and shapes are compared with the arguments before anything is allocated; read_header has
    # compared them with the length of the file.
    claims = {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}
    usage = claims.pop(USAGE, None) if ENTRY in entries else None
    state = CodebookState.checked(kind, arguments, claims, read)
    digest, claimed = state.digest(), entries["digest"]
    if digest != claimed:
        raise StateError(f"its content has the digest {digest} and not {claimed[:64]!r}: it was damaged or changed")
    codebook = Codebook(state, digest, provenance)
    if ENTRY not in entries:
        return codebook
    groups = codebook.code_groups
    check_claim(usage, groups)
    statistics = Statistics.read(_json_object(ENTRY, entries[ENTRY]), read(USAGE), groups=groups, digest=digest)
    return replace(codebook, statistics=statistics)


def _entries(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return our entries of the metadata, without the prefix: those that the format has, and no others.

    Raises:
        CodebookFileError: it is no codebook file.
        StateError: the format is not known, or an entry is missing or unknown.
    """
    version = metadata.get("vqserve.format")
    if version is None:
        raise CodebookFileError(f"it is a safetensors file, but {_IMPORT}")
    if version not in {_FORMAT, _FORMAT_WITH_STATISTICS}:
        known = f"{_FORMAT!r} and {_FORMAT_WITH_STATISTICS!r}"
        raise StateError(f"it has format {version[:20]!r}, this vqserve reads {known}: use a newer one")
    keys = (*_KEYS, ENTRY) if version == _FORMAT_WITH_STATISTICS else _KEYS
    entries = {name.removeprefix(_PREFIX): text for name, text in metadata.items() if name.startswith(_PREFIX)}
    if set(entries) != set(keys):
        odd = sorted(set(entries) ^ set(keys))[0]
        raise StateError(f"metadata entry {_PREFIX + odd!r} is {'missing' if odd in keys else 'unknown'}")
    return entries


def _json_object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=unique_names)
        # NaN and infinity are no JSON, and neither is a number that overflows to one.
        canonical_json(value)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise StateError(f"metadata entry {_PREFIX + name!r} is no JSON object")
    return value
