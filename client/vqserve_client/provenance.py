"""Which codebook made the tokens in a file: written beside it, and read before they are decoded."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vqserve import __version__
from vqserve.codebook_info import CodebookInfo
from vqserve.errors import DigestMismatch, InvalidOption
from vqserve.validation import is_digest
from vqserve_client.catalogue import choose
from vqserve_client.conversion import Conversion, ConversionOptions, Decoding, Encoding
from vqserve_data.drafts import write_file
from vqserve_data.errors import FileError

_SUFFIX = ".json"
# More is no sidecar.
_LARGEST_BYTES = 1 << 20


def description(operation: str, info: CodebookInfo, options: ConversionOptions) -> dict[str, Any]:
    """Return what made an array, as JSON."""
    return {
        "vqserve": __version__,
        "operation": operation,
        "codebook": {
            "name": info.name,
            "digest": info.digest,
            "kind": info.kind,
            "vocab_size": info.vocab_size,
            "num_quantizers": info.num_quantizers,
            "input_dim": info.input_dim,
            "code_dim": info.code_dim,
            "output_dim": info.output_dim,
        },
        "options": {
            "layout": options.layout or info.layout,
            "num_quantizers": options.num_quantizers,
            "batched": options.batched,
            "dtype": options.dtype,
            **({"output": options.output} if operation == "decode" else {}),
        },
    }


def checked(content: Any) -> dict[str, Any]:
    """Return a description that was read from a file, which anybody may have changed.

    Raises:
        ValueError, KeyError, TypeError: it is none.
    """
    codebook, options = content["codebook"], content["options"]
    if not (is_digest(codebook["digest"]) and isinstance(codebook["name"], str)):
        raise ValueError("it names no codebook")
    stages = options["num_quantizers"]
    if not (
        (stages is None or isinstance(stages, int))
        and isinstance(options["layout"], str | None)
        and isinstance(options["batched"], bool)
        and content["operation"] in ("encode", "decode")
    ):
        raise ValueError("its options are none of vqserve")
    return dict(content)


def sidecar(path: Path) -> Path:
    """Return the path of the file that says what made the array in `path`."""
    return path.with_name(path.name + _SUFFIX)


@contextlib.contextmanager
def with_sidecar(path: Path, content: Mapping[str, Any]) -> Iterator[None]:
    """Write the sidecar of the file that the block writes.

    A process that is killed meanwhile may leave a file without one, but never with that of another file.

    Raises:
        FileError: it cannot be written.
    """
    beside = sidecar(path)
    before = beside.read_bytes() if beside.is_file() else None
    beside.unlink(missing_ok=True)
    try:
        yield
    except BaseException:
        if before is not None:
            write_file(beside, [before])
        raise
    write_file(beside, [f"{json.dumps(content, indent=2)}\n".encode()])


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """Return what made the tokens in a file; None: it has no sidecar.

    Raises:
        FileError: the sidecar is damaged.
    """
    beside = sidecar(path)
    try:
        with beside.open("rb") as file:
            text = file.read(_LARGEST_BYTES)
        content = checked(json.loads(text))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileError(f"{beside}, which says what made {path.name}, cannot be read: {error}") from error
    return content


def options_as_made(given: ConversionOptions, made_by: Mapping[str, Any] | None) -> ConversionOptions:
    """Return the options of decode, with those that its tokens were made with.

    Raises:
        InvalidOption: an option says something else.
    """
    if made_by is None:
        return given
    made = made_by["options"]
    if given.num_quantizers not in (None, made["num_quantizers"]):
        raise InvalidOption(
            f"{{option}} is {given.num_quantizers}, and these tokens were made with "
            f"{made['num_quantizers'] or 'all that the codebook has'}: leave it out",
            option="num_quantizers",
        )
    return replace(
        given,
        layout=given.layout or made["layout"],
        num_quantizers=made["num_quantizers"],
        batched=given.batched and made["batched"],
    )


def conversion_of(
    operation: str, codebook: CodebookInfo, options: ConversionOptions, made_by: Mapping[str, Any] | None
) -> Conversion:
    """Return what encodes, or what decodes tokens that were made so.

    Raises:
        InvalidOption: the options do not fit the codebook, or what made the tokens.
    """
    if operation == "encode":
        return Encoding(codebook, options)
    return Decoding(codebook, options_as_made(options, made_by))


def codebook_of(
    made_by: Mapping[str, Any] | None,
    codebooks: Sequence[CodebookInfo],
    *,
    name: str | None,
    digest: str | None,
    target: str,
    force: bool = False,
) -> CodebookInfo:
    """Return the codebook that a job uses: the one that made its tokens, on whatever version it is.

    Args:
        made_by: what made the tokens, or an output that is continued; None: that is not known.
        codebooks: what the servers have.
        name: the codebook that the user names.
        digest: the digest that the user names.
        target: the servers, for errors.
        force: whether tokens may meet another codebook.

    Raises:
        CodebookNotFound: there is no such codebook.
        DigestMismatch: no codebook has the digest.
    """
    if made_by is None or force:
        return choose(codebooks, name, digest, target=target)
    made = made_by["codebook"]
    wanted = made["digest"]
    named = None if name in (None, made["name"]) else choose(codebooks, name, None, target=target)
    other = named.digest if named is not None and named.digest != wanted else digest
    fits = [info for info in codebooks if info.digest == wanted]
    if fits and (other is None or wanted.startswith(other)):
        return min(fits, key=lambda info: (info.name != made["name"], info.is_version, info.name))
    raise DigestMismatch(
        f"codebook {made['name']!r} with digest {wanted} made these tokens, "
        + ("and no codebook of the server has it" if other is None else f"and {other} is another one"),
        target=target,
        digest=other,
        hint="serve that codebook, or use another one with --force",
    )
