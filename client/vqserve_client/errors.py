"""The errors that a call of the SDK can raise: those of `vqserve.errors`, which `Tokenizer` raises as well.

`VqserveClientError` is the name that `VqserveError` had here; it goes with the next release.
"""

from typing import TYPE_CHECKING

from vqserve.errors import (
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
from vqserve.renamed import renamed

if TYPE_CHECKING:
    VqserveClientError = VqserveError
else:
    __getattr__ = renamed(__name__, VqserveClientError=VqserveError)

__all__ = [
    "AccessDenied",
    "Cancelled",
    "Closed",
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
    "MessageTooLarge",
    "NonFiniteLatents",
    "NotAnArray",
    "Overloaded",
    "PermissionDenied",
    "ProtocolError",
    "ServerError",
    "TokenBeyondRange",
    "Unauthenticated",
    "Unavailable",
    "VqserveError",
]
