"""What one client was told, checked once."""

from __future__ import annotations

from dataclasses import dataclass

from vqserve.errors import InvalidOption
from vqserve_client.retry import check_timeout

DEFAULT_MAX_MESSAGE_BYTES = 64 << 20
# Room for the envelope and a row of a small codebook; gRPC takes the limit as a C int.
_MESSAGE_BYTES = range(1 << 10, 1 << 31)


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """One client's options; see Client for what they mean."""

    target: str
    codebook: str | None = None
    digest: str | None = None
    timeout: float = 60.0
    retries: int = 3
    window: int = 4
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES

    def __post_init__(self) -> None:
        if not isinstance(self.target, str):
            raise TypeError(f"target must be a string such as 'localhost:50051', not {type(self.target).__name__}")
        if not _is_target(self.target):
            raise InvalidOption(
                f"{{option}} must be HOST:PORT, such as 'localhost:50051', not {self.target!r}", option="target"
            )
        check_name("codebook", self.codebook)
        check_digest(self.digest)
        object.__setattr__(self, "timeout", check_timeout(self.timeout))
        _check_integer("retries", self.retries, range(1 << 31))
        _check_integer("window", self.window, range(1, 1 << 31))
        _check_integer("max_message_bytes", self.max_message_bytes, _MESSAGE_BYTES)


def _is_target(target: str) -> bool:
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    # gRPC would take port 443 where there is none, and one that is too large modulo 65536.
    host, _, port = target.rpartition(":")
    return host != "" and "://" not in host and port.isdecimal() and int(port) < 1 << 16


def check_name(what: str, name: str | None) -> None:
    """Check an optional name.

    Raises:
        TypeError: if it is not a string.
        InvalidOption: if it is empty.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"{what} must be a string, not {type(name).__name__}")
    if name == "":
        raise InvalidOption("{option} must not be empty", option=what)


def check_digest(digest: str | None) -> None:
    """Check an optional digest.

    Raises:
        TypeError: if it is not a string.
        InvalidOption: if it is not 64 lower-case hexadecimal digits.
    """
    check_name("digest", digest)
    if digest is not None and not is_digest(digest):
        raise InvalidOption(
            f"{{option}} must be the codebook's 64 lower-case hexadecimal digits, not {digest!r}", option="digest"
        )


def is_digest(text: str) -> bool:
    """Return whether a text has a digest's form."""
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def _check_integer(what: str, value: int, allowed: range) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} must be an integer, not {value!r}")
    if value not in allowed:
        raise InvalidOption(f"{{option}} must be from {allowed.start} to {allowed.stop - 1}, not {value}", option=what)
