"""The client of vqserve: latents to indices and back, over gRPC, without torch."""

from vqserve import __version__
from vqserve.codebook_info import CodebookInfo
from vqserve.layout import Layout
from vqserve_client.async_client import AsyncClient
from vqserve_client.client import Client
from vqserve_client.errors import (
    AccessDenied,
    Cancelled,
    Closed,
    CodebookNotFound,
    DeadlineExceeded,
    DigestChanged,
    DigestMismatch,
    InvalidArgument,
    MessageTooLarge,
    Overloaded,
    ProtocolError,
    ServerError,
    Unavailable,
    VqserveClientError,
)

__all__ = [
    "AccessDenied",
    "AsyncClient",
    "Cancelled",
    "Client",
    "Closed",
    "CodebookInfo",
    "CodebookNotFound",
    "DeadlineExceeded",
    "DigestChanged",
    "DigestMismatch",
    "InvalidArgument",
    "Layout",
    "MessageTooLarge",
    "Overloaded",
    "ProtocolError",
    "ServerError",
    "Unavailable",
    "VqserveClientError",
    "__version__",
]
