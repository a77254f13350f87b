"""What can go wrong, in the words of the domain: nothing here knows of gRPC (rpc/status.py maps it).

VqserveError
├── InvalidRequest (also a ValueError)
│   ├── InvalidShape
│   ├── InvalidDtype
│   │   └── NotAnArray (also a TypeError)
│   ├── InvalidOption
│   ├── NonFiniteLatents
│   │   └── TokenBeyondRange
│   └── IndexOutOfRange
├── UnknownCodebook (also a LookupError)
├── DigestMismatch
├── Overloaded
├── DeadlineExpired
├── Cancelled
├── Draining
├── DeviceBroken
├── Closed
├── StartError, which no caller ever sees
└── CodebookError (also a ValueError)
    ├── CodebookFileError
    └── ForeignCheckpointError

The text of an InvalidRequest, an UnknownCodebook, a DigestMismatch and an Overloaded reaches the caller over the
wire: it must never hold a path or anything else of the server's own.
"""

from __future__ import annotations

from collections.abc import Sequence


class VqserveError(Exception):
    """Base of all errors that vqserve raises on purpose."""


class InvalidRequest(VqserveError, ValueError):
    """The caller's arrays or options cannot be served."""


class InvalidShape(InvalidRequest):
    """An array has the wrong rank, channel count or size."""


class InvalidDtype(InvalidRequest):
    """An array has an element type that cannot be served."""


class NotAnArray(InvalidDtype, TypeError):
    """A value is no array at all, or one without plain values: a list, a scalar, a masked array, a sparse tensor."""


class InvalidOption(InvalidRequest):
    """An option has a value that is not one of its values."""


class NonFiniteLatents(InvalidRequest):
    """Latents hold NaN or infinity, or leave float32's range on their way to the codes."""


class TokenBeyondRange(NonFiniteLatents):
    """A token leaves float32's range on its way to the codes; the text names its position in the grid."""

    def __init__(self, text: str, row: int, grid: Sequence[int]) -> None:
        """Name the token.

        Args:
            text: what happens to it, with {token} where its name belongs.
            row: the token, counted in C order of the grid.
            grid: shape of the tokens.
        """
        # What an exception is made of pickles it.
        super().__init__(text, row, grid)
        self.text = text
        self.row = row
        self.grid = tuple(grid)

    def __str__(self) -> str:
        row, position = self.row, [0] * len(self.grid)
        for axis in reversed(range(len(self.grid))):
            row, position[axis] = divmod(row, self.grid[axis])
        return self.text.format(token=f"token {position}")


class IndexOutOfRange(InvalidRequest):
    """An index is not one of the vocabulary."""


class UnknownCodebook(VqserveError, LookupError):
    """No codebook of that name is served."""


class DigestMismatch(VqserveError):
    """The caller pinned a digest and the codebook has another."""


class Overloaded(VqserveError):
    """The queue is full; `retry_after_s` is when to try again, in seconds."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExpired(VqserveError):
    """The caller's deadline passed before the device got to the request."""


class Cancelled(VqserveError):
    """The caller went away before the device got to the request."""


class Draining(VqserveError):
    """The server is stopping and takes no new requests."""


class DeviceBroken(VqserveError):
    """The device failed; this process cannot serve any more."""


class Closed(VqserveError):
    """The tokenizer was closed."""


class StartError(VqserveError):
    """The daemon cannot start; the text says why, in one line."""


class CodebookError(VqserveError, ValueError):
    """A codebook cannot be used."""


class CodebookFileError(CodebookError):
    """A codebook file is damaged, inconsistent or of an unknown version."""


class ForeignCheckpointError(CodebookError):
    """A foreign checkpoint cannot be read, or does not say enough to be imported."""
