"""The client of vqserve: latents to indices and back, over gRPC, without torch."""

from typing import TYPE_CHECKING

from vqserve import __version__
from vqserve.codebook_info import CodebookInfo
from vqserve.layout import Layout
from vqserve.renamed import renamed
from vqserve_client.async_client import AsyncClient
from vqserve_client.client import Client
from vqserve_client.errors import (
    AccessDenied,
    Cancelled,
    Closed,
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
    MessageTooLarge,
    NonFiniteLatents,
    NotAnArray,
    Overloaded,
    PermissionDenied,
    ProtocolError,
    ServerError,
    TokenBeyondRange,
    Unauthenticated,
    Unavailable,
    VqserveError,
)
from vqserve_client.server_info import ServerInfo
from vqserve_client.tls import Tls

if TYPE_CHECKING:
    VqserveClientError = VqserveError
else:
    __getattr__ = renamed(__name__, VqserveClientError=VqserveError)

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
