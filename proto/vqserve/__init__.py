"""vqserve: latents to indices and back, over gRPC.

This package is the wire contract that client and server share; it needs numpy and protobuf only. It also exports the
client's names. Each is imported at its first use, so that `import vqserve` does not import the client.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from vqserve.renamed import warn_renamed

if TYPE_CHECKING:
    from vqserve_client import (
        AccessDenied,
        AsyncClient,
        Cancelled,
        Client,
        Closed,
        CodebookInfo,
        CodebookNotFound,
        DeadlineExceeded,
        DeviceBroken,
        DigestChanged,
        DigestMismatch,
        Draining,
        IndexOutOfRange,
        InvalidArgument,
        InvalidDtype,
        InvalidOption,
        InvalidShape,
        Layout,
        MessageTooLarge,
        NonFiniteLatents,
        NotAnArray,
        Overloaded,
        PermissionDenied,
        ProtocolError,
        ServerError,
        ServerInfo,
        Tls,
        TokenBeyondRange,
        Unauthenticated,
        Unavailable,
        VqserveError,
    )

    VqserveClientError = VqserveError

__version__ = "0.1.0"

__all__ = [
    "AccessDenied",
    "AsyncClient",
    "Cancelled",
    "Client",
    "Closed",
    "CodebookInfo",
    "CodebookNotFound",
    "DeadlineExceeded",
    "DeviceBroken",
    "DigestChanged",
    "DigestMismatch",
    "Draining",
    "IndexOutOfRange",
    "InvalidArgument",
    "InvalidDtype",
    "InvalidOption",
    "InvalidShape",
    "Layout",
    "MessageTooLarge",
    "NonFiniteLatents",
    "NotAnArray",
    "Overloaded",
    "PermissionDenied",
    "ProtocolError",
    "ServerError",
    "ServerInfo",
    "Tls",
    "TokenBeyondRange",
    "Unauthenticated",
    "Unavailable",
    "VqserveError",
    "__version__",
]


# The modules of the names that do not need the client; all other such names are errors.
_HOMES = {"CodebookInfo": "vqserve.codebook_info", "Layout": "vqserve.layout"}
_CLIENT = {"AsyncClient", "Client", "ServerInfo", "Tls"}


def __getattr__(name: str) -> object:
    if name in __all__:
        home = "vqserve_client" if name in _CLIENT else _HOMES.get(name, "vqserve.errors")
        value: object = getattr(import_module(home), name)
        globals()[name] = value
        return value
    if name == "VqserveClientError":
        from vqserve.errors import VqserveError  # noqa: PLC0415

        warn_renamed(__name__, name, VqserveError)
        return VqserveError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
