"""vqserve: latents to indices and back, over gRPC.

This package is the wire contract, which client and server share, with numpy and protobuf only. The names of the client
are here too: each is imported when it is first used, so that `import vqserve` stays as light as the contract.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

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
        ProtocolError,
        ServerError,
        TokenBeyondRange,
        Unavailable,
        VqserveClientError,
        VqserveError,
    )

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
    "ProtocolError",
    "ServerError",
    "TokenBeyondRange",
    "Unavailable",
    "VqserveClientError",
    "VqserveError",
    "__version__",
]


# The errors, and these two, need nothing of the client.
_HOMES = {"CodebookInfo": "vqserve.codebook_info", "Layout": "vqserve.layout"}
_CLIENT = {"AsyncClient", "Client", "VqserveClientError"}


def __getattr__(name: str) -> object:
    if name in __all__:
        home = "vqserve_client" if name in _CLIENT else _HOMES.get(name, "vqserve.errors")
        value: object = getattr(import_module(home), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
