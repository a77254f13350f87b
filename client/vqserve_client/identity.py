"""What a client sends with each request beside its message: the request's id, a token, the caller's own metadata."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from vqserve.error_wire import REQUEST_ID_KEY
from vqserve.errors import InvalidOption, quoted
from vqserve_client.target import Target

Metadata = tuple[tuple[str, str | bytes], ...]

AUTHORIZATION = "authorization"
# What RFC 6750 allows, of the length that a header has room for.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{1,2048}=*", re.ASCII)
_KEY = re.compile(r"[a-z0-9_.-]{1,100}", re.ASCII)
_VALUE = re.compile(r"[\x20-\x7e]{0,4096}", re.ASCII)
_LARGEST_TOKEN_FILE = 1 << 16
_RESERVED = ("grpc-", "vqserve-", ":")


class Identity:
    """The metadata of one client's requests. It is never shown."""

    def __init__(self, *, token: str | None, token_file: str | None, metadata: Metadata) -> None:
        self._fixed = metadata if token is None else (*metadata, _bearer(token))
        self._file = None if token_file is None else TokenFile(token_file)

    def metadata(self, request_id: str) -> Metadata:
        """Return the metadata of a request.

        Raises:
            InvalidOption: there was never a token in the token file.
        """
        if self._file is None:
            return ((REQUEST_ID_KEY, request_id), *self._fixed)
        return ((REQUEST_ID_KEY, request_id), *self._fixed, self._file.entry())


class TokenFile:
    """A file with one token, read again after it changed; while it has no token, the last one counts."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        # Replaced as a whole, so that threads need no lock for it: what the file was, and the entry made from it.
        self._read: tuple[object, tuple[str, str] | None] = (None, None)

    def entry(self) -> tuple[str, str]:
        """Return the metadata entry with the token.

        Raises:
            InvalidOption: there was never a token in the file.
        """
        seen, entry = self._read
        try:
            status = self._path.stat()
            now = (status.st_mtime_ns, status.st_ino, status.st_size)
            if now == seen and entry is not None:
                return entry
            new = _bearer(read_token(self._path))
        except (OSError, InvalidOption) as error:
            if entry is not None:
                return entry
            raise _unreadable(self._path, error) if isinstance(error, OSError) else error from None
        self._read = (now, new)
        return new


def read_token(path: Path) -> str:
    """Return the token in a file.

    Raises:
        OSError: the file cannot be read.
        InvalidOption: it does not contain one token.
    """
    with path.open("rb") as file:
        text = file.read(_LARGEST_TOKEN_FILE).decode("ascii", "replace").strip()
    if _TOKEN.fullmatch(text) is None:
        # Without a word of it: it may be another secret.
        raise InvalidOption(
            f"{{option}}: {quoted(str(path), 200)} must contain one token and nothing else", option="token_file"
        )
    return text


def check_token(token: str | None) -> None:
    """Check a token; its text is in no error.

    Raises:
        TypeError: it is not a string.
        InvalidOption: it has other characters than a token has, or is too long.
    """
    if token is None:
        return
    if not isinstance(token, str):
        raise TypeError(f"token must be a string, not {type(token).__name__}")
    if _TOKEN.fullmatch(token) is None:
        raise InvalidOption(
            "{option} must be of 1 to 2048 letters, digits and characters of '-._~+/', as `vqserved token` makes it",
            option="token",
        )


def check_token_file(path: str | None) -> None:
    """Check that a file has a token.

    Raises:
        InvalidOption: it has none, or cannot be read.
    """
    if path is not None:
        TokenFile(path).entry()


def checked_metadata(metadata: Mapping[str, str | bytes] | None) -> Metadata:
    """Return the caller's own metadata; values are in no error.

    Raises:
        TypeError: it is not a dictionary, or a value has the wrong type for its key.
        InvalidOption: gRPC cannot send an entry, or a key is reserved.
    """
    if metadata is None:
        return ()
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata must be a dictionary, not {type(metadata).__name__}")
    for key, value in metadata.items():
        if not isinstance(key, str) or _KEY.fullmatch(key) is None:
            raise InvalidOption(
                f"{{option}} must have keys of lower-case letters, digits and '-_.', not {quoted(key)}",
                option="metadata",
            )
        if key.startswith(_RESERVED):
            raise InvalidOption(f"{{option}} must not have the key {quoted(key)}, which is reserved", option="metadata")
        kind = bytes if key.endswith("-bin") else str
        if not isinstance(value, kind):
            raise TypeError(f"metadata {quoted(key)} must be of type {kind.__name__}, not {type(value).__name__}")
        if isinstance(value, str) and _VALUE.fullmatch(value) is None:
            raise InvalidOption(
                f"{{option}} {quoted(key)} must have a value of printable ASCII characters, at most 4096",
                option="metadata",
            )
    return tuple(metadata.items())


def token_of(token: str | None, token_file: str | PathLike[str] | None) -> tuple[str | None, str | None]:
    """Return the token and the path of its file, one of them at most; if neither is given, those of the environment.

    Raises:
        InvalidOption: both are given.
    """
    if token is not None and token_file is not None:
        raise InvalidOption("give {token=} or {token_file=}, not both", option="token")
    if token is None and token_file is None:
        token = os.environ.get("VQSERVE_TOKEN") or None
        token_file = None if token is not None else os.environ.get("VQSERVE_TOKEN_FILE") or None
    return token, None if token_file is None else os.fspath(token_file)


def check_secrecy(target: Target, *, is_encrypted: bool, insecure: bool) -> None:
    """Check that a token is not sent where others can read it.

    Raises:
        InvalidOption: the connection is not encrypted, and leaves this machine.
    """
    if not (is_encrypted or insecure or target.is_loopback):
        raise InvalidOption(
            f"the token would be sent to {quoted(target.host_beyond, 200)} without encryption",
            option="token",
            hint="connect with {tls=}; or, on a network that you trust, with {insecure=}",
        )


def _bearer(token: str) -> tuple[str, str]:
    return AUTHORIZATION, f"Bearer {token}"


def _unreadable(path: Path, error: OSError) -> InvalidOption:
    return InvalidOption(
        f"{{option}}: cannot read {quoted(str(path), 200)}: {error.strerror or 'an error'}", option="token_file"
    )
