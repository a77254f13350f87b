"""The errors of `vqserve.errors`, with aliases for their former names here, until the next release."""

from vqserve.errors import (
    Cancelled,
    Closed,
    CodebookError,
    CodebookFileError,
    CodebookNotFound,
    DeadlineExceeded,
    DeviceBroken,
    DigestMismatch,
    Draining,
    ForeignCheckpointError,
    IndexOutOfRange,
    InvalidArgument,
    InvalidDtype,
    InvalidOption,
    InvalidShape,
    MessageTooLarge,
    NonFiniteLatents,
    NotAnArray,
    Overloaded,
    StartError,
    TokenBeyondRange,
    VqserveError,
)

InvalidRequest = InvalidArgument
UnknownCodebook = CodebookNotFound
DeadlineExpired = DeadlineExceeded

__all__ = [
    "Cancelled",
    "Closed",
    "CodebookError",
    "CodebookFileError",
    "CodebookNotFound",
    "DeadlineExceeded",
    "DeadlineExpired",
    "DeviceBroken",
    "DigestMismatch",
    "Draining",
    "ForeignCheckpointError",
    "IndexOutOfRange",
    "InvalidArgument",
    "InvalidDtype",
    "InvalidOption",
    "InvalidRequest",
    "InvalidShape",
    "MessageTooLarge",
    "NonFiniteLatents",
    "NotAnArray",
    "Overloaded",
    "StartError",
    "TokenBeyondRange",
    "UnknownCodebook",
    "VqserveError",
]
