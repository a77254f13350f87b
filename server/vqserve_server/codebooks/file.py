"""Codebook files: a quantizer on disk, written in one step and read with everything checked (docs/codebooks.md)."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy.typing as npt

from vqserve.errors import CodebookError, CodebookFileError
from vqserve_server.codebook_files import SUFFIX
from vqserve_server.codebooks.kinds import KINDS
from vqserve_server.codebooks.safetensors_file import ContainerError, read_header, read_tensor, unique_names, write_file
from vqserve_server.codebooks.state import CodebookState, StateError, canonical_json
from vqserve_server.quantizers import Quantizer

FORMAT_VERSION = "1"
_PREFIX = "vqserve."
_KEYS = ("format", "kind", "arguments", "digest", "provenance")
# A codebook has a handful of tensors and a page of provenance.
_MAX_HEADER_BYTES = 1 << 20
_MAX_PROVENANCE_BYTES = 1 << 18
# How files begin that codebooks come in, too: read as the length of a header, each is more than a codebook's.
_FOREIGN = {
    b"\x93NUMPY": "a .npy file",
    b"PK\x03\x04": "a torch file",
    # A pickle, as torch wrote it until 1.6.
    b"\x80\x02\x8a\x0a": "a torch file",
}
_LONGEST_MAGIC = max(map(len, _FOREIGN))


@dataclass(frozen=True)
class Codebook:
    """A codebook file as it was read.

    Attributes:
        quantizer: on the CPU, in eval mode.
        kind: a key of `KINDS`: "vq", "ema" and so on.
        arguments: of the quantizer's constructor.
        digest: lower-case hexadecimal SHA-256 of what encode and decode read.
        provenance: origin of the codebook, as its writer gave it; it has no effect.
    """

    quantizer: Quantizer = field(repr=False)
    kind: str
    arguments: Mapping[str, object]
    digest: str
    provenance: Mapping[str, object] = field(default_factory=dict)


class _NotACodebook(Exception):
    """A safetensors file that is not a codebook."""


def codebook_digest(quantizer: Quantizer) -> str:
    """Return the digest that a file of this quantizer has.

    Raises:
        CodebookError: a file cannot hold the quantizer.
    """
    return CodebookState.of(quantizer).digest()


def save_codebook(quantizer: Quantizer, path: str | Path, *, provenance: Mapping[str, object] | None = None) -> str:
    """Write a quantizer as a codebook file, in one step: a reader sees the old file or the whole new one.

    The same quantizer and provenance give the same bytes.

    Args:
        quantizer: of a kind that files hold, on any device, float32 or float64.
        path: the file, by custom with the ending ".safetensors"; one that is there is replaced.
        provenance: where the codebook comes from; what JSON can hold. It does not change the digest.

    Returns:
        The digest.

    Raises:
        CodebookError: the quantizer or the provenance cannot be kept in a file.
        OSError: the file cannot be written.
    """
    return save_state(CodebookState.of(quantizer), path, provenance=provenance)


def save_state(state: CodebookState, path: str | Path, *, provenance: Mapping[str, object] | None = None) -> str:
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
        "vqserve.format": FORMAT_VERSION,
        "vqserve.kind": state.kind,
        "vqserve.arguments": canonical_json(state.written_arguments()),
        # Only the digest reveals a flipped bit in a weight.
        "vqserve.digest": digest,
        "vqserve.provenance": story,
    }
    write_file(Path(path), state.tensors, metadata)
    return digest


def load_codebook(path: str | Path) -> Codebook:
    """Read a codebook file; nothing in it is trusted, and memory is bounded by a few times its length.

    Raises:
        CodebookFileError: names the file without its folder, says what is wrong and what to do.
    """
    path = Path(path)
    try:
        # Opening a pipe would wait for a writer.
        if path.exists() and not path.is_file():
            raise CodebookFileError(f"codebook {path.stem!r} is no regular file: name the {SUFFIX} file itself")
        with path.open("rb") as file:
            _check_is_ours(file, path)
            state, digest, provenance = _read(file)
    except FileNotFoundError:
        raise CodebookFileError(f"{path.name}: there is no such file") from None
    except OSError as error:
        raise CodebookFileError(f"codebook {path.stem!r} cannot be read: {error.strerror or error}") from None
    except _NotACodebook:
        raise CodebookFileError(
            f"{path.name} is a safetensors file, but not a codebook file: `vqserved import {shlex.quote(path.name)} "
            f"-o NAME{SUFFIX}`"
        ) from None
    except (ContainerError, StateError) as error:
        what = f"it {error}" if isinstance(error, ContainerError) else str(error)
        advice = "copy the file again or make it anew with `vqserved import`"
        raise CodebookFileError(f"codebook {path.stem!r} cannot be used: {what}; {advice}") from None
    return Codebook(state.build(), state.kind, state.arguments, digest, provenance)


def _check_is_ours(file: BufferedReader, path: Path) -> None:
    """Check that a file does not have a known format that must be imported first.

    Raises:
        CodebookFileError: it has; the error gives the format and the command that imports it.
    """
    begin = file.read(_LONGEST_MAGIC)
    for magic, what in _FOREIGN.items():
        if begin.startswith(magic):
            raise CodebookFileError(_import_first(path, "an .npz file" if path.suffix == ".npz" else what))


def _import_first(path: Path, what: str) -> str:
    # The file itself may be named as a codebook file is.
    out = f"{path.stem}{'-codebook' if path.suffix == SUFFIX else ''}{SUFFIX}"
    command = f"vqserved import {shlex.quote(path.name)} -o {shlex.quote(out)}"
    return f"{path.name} is {what}, not a codebook file: `{command}`"


def _read(file: BufferedReader) -> tuple[CodebookState, str, dict[str, Any]]:
    header = read_header(file, max_header_bytes=_MAX_HEADER_BYTES)
    kind, arguments, provenance = _read_metadata(header.metadata)

    def read(name: str) -> npt.NDArray[Any]:
        array = read_tensor(file, header.tensors[name])
        return array.astype(array.dtype.newbyteorder("="), copy=False)

    # All names, types and shapes are compared with the arguments before anything is allocated; read_header has
    # compared them with the length of the file.
    claims = {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}
    state = CodebookState.checked(kind, arguments, claims, read)
    digest, claimed = state.digest(), header.metadata["vqserve.digest"]
    if digest != claimed:
        raise StateError(f"its content has the digest {digest} and not {claimed[:64]!r}: it was damaged or changed")
    return state, digest, provenance


def _read_metadata(metadata: Mapping[str, str]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    version = metadata.get("vqserve.format")
    if version is None:
        raise _NotACodebook
    if version != FORMAT_VERSION:
        raise StateError(f"it has format {version[:20]!r}, this vqserve reads {FORMAT_VERSION!r}: use a newer one")
    ours = {name.removeprefix(_PREFIX): text for name, text in metadata.items() if name.startswith(_PREFIX)}
    if set(ours) != set(_KEYS):
        odd = sorted(set(ours) ^ set(_KEYS))[0]
        raise StateError(f"metadata entry {_PREFIX + odd!r} is {'missing' if odd in _KEYS else 'unknown'}")
    kind = ours["kind"]
    if kind not in KINDS:
        raise StateError(f"it is of unknown kind {kind[:40]!r}, not one of {', '.join(KINDS)}")
    return kind, _json_object("arguments", ours["arguments"]), _json_object("provenance", ours["provenance"])


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
