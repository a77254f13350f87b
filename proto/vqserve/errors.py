"""The one tree of errors: of the SDK, of the server, and of a `Tokenizer` in process.

VqserveError
├── InvalidArgument (also a ValueError)
│   ├── InvalidShape
│   ├── InvalidDtype
│   │   └── NotAnArray (also a TypeError)
│   ├── InvalidOption
│   ├── NonFiniteLatents
│   │   └── TokenBeyondRange
│   ├── IndexOutOfRange
│   └── MessageTooLarge
├── CodebookNotFound (also a LookupError)
├── DigestMismatch
├── DigestChanged
├── Overloaded
├── DeadlineExceeded (also a TimeoutError)
├── Unavailable (also a ConnectionError)
│   ├── Draining
│   └── DeviceBroken
├── AccessDenied
├── Cancelled
├── ServerError
├── ProtocolError
├── Closed
├── StartError
└── CodebookError (also a ValueError)
    ├── CodebookFileError
    └── ForeignCheckpointError

An error is made of fields; its text is made where it is shown (`VqserveError.text`). docs/errors.md has the table.
Nothing but the standard library is imported: everything else may import this module.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any, Literal, Self, get_args

ArrayName = Literal["latents", "indices", "tokens"]
"""What a position counts in: one of the caller's arrays, or the grid of their tokens."""
ARRAY_NAMES: tuple[str, ...] = get_args(ArrayName)

# {timeout=} is the argument of that name, whichever it is.
_PLACEHOLDER = re.compile(r"\{(?:(where|option|suggestion)|([a-z_]{1,40})=)\}")


@dataclass(frozen=True)
class Spelling:
    """How the reader of a text writes the arguments of a call."""

    is_command_line: bool = False

    def name(self, option: str) -> str:
        """Return `layout`, or `--layout`."""
        return f"--{option.replace('_', '-')}" if self.is_command_line else option

    def mention(self, option: str) -> str:
        """Return `layout=`, or `--layout`."""
        return self.name(option) if self.is_command_line else f"{option}="

    def setting(self, option: str, value: object) -> str:
        """Return `layout="channels_last"`, or `--layout channels_last`."""
        if self.is_command_line:
            return f"{self.name(option)} {value}"
        return f"{option}={json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)}"


PYTHON = Spelling()
COMMAND_LINE = Spelling(is_command_line=True)


class VqserveError(Exception):
    """Base of all errors that vqserve raises on purpose; they pickle with all their fields.

    Attributes:
        template: what went wrong, with placeholders: {where} for the position, {option} and {suggestion} for the fields
            of these names, and {timeout=} for the argument `timeout`, and so on.
        code: name of the gRPC status that the class stands for or that the server sent, such as "NOT_FOUND"; None where
            gRPC has none.
        target: address of the server; None in process.
        codebook: name of the codebook; None if it is not known or does not matter.
        digest: of that codebook, as it is; None if it does not matter.
        request_id: what the server's log calls the failed request; None if none was sent.
        item: which array of `encode_many` or `decode_many` failed, from 0; None in other calls.
        array: what `position` counts in: "latents", "indices", or "tokens", which is the grid without the channels.
        position: index of the offending element, one number an axis; None if the error is not about one.
        row: number of the offending token in C order, until `placed` makes a position of it.
        option: name of the argument that the error is about, as Python has it.
        suggestion: arguments to try, by name.
        path: file that the offending array or codebook is in; it is not sent to a caller.
    """

    hint = ""
    default_code: str | None = None

    def __init__(
        self,
        template: str = "",
        *,
        code: str | None = None,
        target: str | None = None,
        codebook: str | None = None,
        digest: str | None = None,
        request_id: str | None = None,
        item: int | None = None,
        array: str | None = None,
        position: Sequence[int] | None = None,
        row: int | None = None,
        option: str | None = None,
        suggestion: Mapping[str, str | int] | None = None,
        path: str | PathLike[str] | None = None,
    ) -> None:
        # What an exception is made of pickles it, and the rest of its fields follow.
        super().__init__(template)
        self.template = template
        self.code = code or self.default_code
        self.target = target
        self.codebook = codebook
        self.digest = digest
        self.request_id = request_id
        self.item = item
        self.array = array
        self.position = None if position is None else tuple(position)
        self.row = row
        self.option = option
        self.suggestion = dict(suggestion or {})
        self.path = None if path is None else fspath(path)

    @property
    def message(self) -> str:
        """What went wrong and where, without the rest of what `str` shows."""
        return self.statement()

    @property
    def where(self) -> str:
        """The offending element: "latents[0, 3]", "token [7]"; without a position the array's name."""
        if self.position is None and self.row is None:
            return self.array or "it"
        name = "token " if self.array == "tokens" else self.array or "element "
        return f"{name}{list(self.position or (self.row,))}"

    def statement(self, spelling: Spelling = PYTHON) -> str:
        """Return what went wrong and where, in the words of a reader who writes arguments like this."""
        stated = _filled(self.template, spelling, where=self.where, option=self.option, suggestion=self.suggestion)
        return stated if self.path is None else f"{self.path}: {stated}"

    def text(self, spelling: Spelling = PYTHON) -> str:
        """Return all that there is to tell a user: what, in which call, and what to do."""
        call = ", ".join(
            text
            for text, value in (
                (f"array {self.item}, counting from 0", self.item is not None),
                (f"server {self.target}", self.target),
                (f"codebook {self.codebook!r}", self.codebook),
                (f"request {self.request_id}", self.request_id),
            )
            if value
        )
        stated = self.statement(spelling)
        advice = _filled(self.hint, spelling)
        return f"{stated}{f' ({call})' if call else ''}{f': {advice}' if advice else ''}"

    def __str__(self) -> str:
        return self.text()

    def with_fields(self, **changes: Any) -> Self:
        """Return the same error with other values of some fields."""
        changed = copy.copy(self)
        vars(changed).update(changes)
        if "template" in changes:
            changed.args = (changes["template"],)
        return changed

    def noted(self, note: str) -> Self:
        """Return the same error with more to say, after a semicolon."""
        return self.with_fields(template=f"{self.template}; {note}")

    def shifted(self, offset: Sequence[int]) -> Self:
        """Return the error of a part of an array as one of the whole; as it is if it has no such position.

        Args:
            offset: where the part begins in the whole, one number an axis.
        """
        if self.position is None or len(self.position) != len(offset):
            return self
        return self.with_fields(position=tuple(map(int.__add__, self.position, offset)))

    def placed(self, grid: Sequence[int], start: int = 0) -> Self:
        """Return the error of a row as one of a token in a grid; as it is if it is not about a row.

        Args:
            grid: shape of the tokens.
            start: token, in C order, that row 0 is.
        """
        if self.row is None:
            return self
        row, position = self.row + start, [0] * len(grid)
        for axis in reversed(range(len(grid))):
            row, position[axis] = divmod(row, grid[axis])
        return self.with_fields(row=None, position=tuple(position))


@contextmanager
def rows_placed(grid: Sequence[int], start: int = 0) -> Iterator[None]:
    """Let errors about rows leave the block as errors about tokens in a grid; see `VqserveError.placed`."""
    try:
        yield
    except VqserveError as error:
        if error.row is None:
            raise
        raise error.placed(grid, start) from None


@contextmanager
def of_file(path: str | PathLike[str] | None) -> Iterator[None]:
    """Let errors about an array leave the block with the file that it is in; None: it is in none."""
    try:
        yield
    except InvalidArgument as error:
        if path is None or error.array is None or error.path is not None:
            raise
        raise error.with_fields(path=fspath(path)) from None


class LayoutWarning(UserWarning):
    """An array can be read in two ways; `suggestion` says which argument settles it."""

    def __init__(self, template: str, suggestion: Mapping[str, str | int] | None = None) -> None:
        super().__init__(template)
        self.template = template
        self.suggestion = dict(suggestion or {})

    def text(self, spelling: Spelling = PYTHON) -> str:
        """Return what the user is told; see `VqserveError.text`."""
        return _filled(self.template, spelling, suggestion=self.suggestion)

    def __str__(self) -> str:
        return self.text()


class InvalidArgument(VqserveError, ValueError):
    """The array or an option cannot be served: wrong shape, dtype, NaN, index out of range."""

    default_code = "INVALID_ARGUMENT"


class InvalidShape(InvalidArgument):
    """An array has the wrong rank, channel count or size."""


class InvalidDtype(InvalidArgument):
    """An array has an element type that cannot be served."""


class NotAnArray(InvalidDtype, TypeError):
    """A value is no array at all, or one without plain values: a list, a scalar, a masked array, a sparse tensor."""


class InvalidOption(InvalidArgument):
    """An option has a value that is not one of its values."""


class NonFiniteLatents(InvalidArgument):
    """Latents hold NaN or infinity, or leave float32's range on their way to the codes."""

    hint = "no code stands for it, find out where it comes from"


class TokenBeyondRange(NonFiniteLatents):
    """A token leaves float32's range on its way to the codes."""

    hint = "scale the latents down"


class IndexOutOfRange(InvalidArgument):
    """An index is not one of the vocabulary."""

    hint = "are the indices of this codebook?"


class MessageTooLarge(InvalidArgument):
    """A message is larger than one side takes, or one row alone does not fit."""

    hint = "{max_message_bytes=} must be what both sides take"


class CodebookNotFound(VqserveError, LookupError):
    """No codebook of that name is served, or none was named and the server has several."""

    default_code = "NOT_FOUND"


class DigestMismatch(VqserveError):
    """The codebook has another digest than the one that was pinned; `digest` is the one that it has."""

    default_code = "FAILED_PRECONDITION"
    hint = "pin that one with {digest=}, or have the old one served"


class DigestChanged(VqserveError):
    """The codebook was replaced while the call ran; no answer mixes the tokens of two."""

    default_code = "FAILED_PRECONDITION"
    hint = "call again for an answer from the new one alone"


class Overloaded(VqserveError):
    """The server's queue is full, for the SDK at every retry.

    Attributes:
        retry_after_s: when the server would like to be asked again, in seconds; None if it did not say.
    """

    default_code = "RESOURCE_EXHAUSTED"
    hint = "try again later, or with fewer requests at once"

    def __init__(self, template: str = "", *, retry_after_s: float | None = None, **fields: Any) -> None:
        super().__init__(template, **fields)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(VqserveError, TimeoutError):
    """The call did not end within its timeout."""

    default_code = "DEADLINE_EXCEEDED"
    hint = "allow it more with {timeout=}; `vqserve status` tells whether the server serves"


class Unavailable(VqserveError, ConnectionError):
    """The server cannot be reached or is stopping, for the SDK at every retry."""

    default_code = "UNAVAILABLE"
    hint = "is the server running, and is this its address? `vqserved serve` starts one"


class Draining(Unavailable):
    """The server is stopping and takes no new requests."""

    hint = "try again when it, or another one, is there"


class DeviceBroken(Unavailable):
    """The device failed; this server process cannot serve any more."""

    hint = "try again when the server has been started again"


class AccessDenied(VqserveError):
    """The server does not let this caller in."""

    default_code = "PERMISSION_DENIED"


class Cancelled(VqserveError):
    """The caller has left, or something between client and server cancelled the call."""

    default_code = "CANCELLED"


class ServerError(VqserveError):
    """The server failed; its log has the reason under the request id."""

    default_code = "INTERNAL"


class ProtocolError(VqserveError):
    """A reply does not fit its request, or the peer does not speak vqserve.v1; nothing of the reply was used."""

    hint = "are client and server of the same version?"


class Closed(VqserveError):
    """The client or the tokenizer was closed, or a generator was carried into a forked process."""

    hint = "make a new one"


class StartError(VqserveError):
    """The daemon cannot start; the text says why, in one line."""


class CodebookError(VqserveError, ValueError):
    """A codebook cannot be used."""


class CodebookFileError(CodebookError):
    """A codebook file is damaged, inconsistent or of an unknown version."""


class ForeignCheckpointError(CodebookError):
    """A foreign checkpoint cannot be read, or does not say enough to be imported."""


def _filled(
    template: str,
    spelling: Spelling,
    *,
    where: str = "",
    option: str | None = None,
    suggestion: Mapping[str, object] | None = None,
) -> str:
    # One pass: what a placeholder is replaced by is not looked at again.
    def value(placeholder: re.Match[str]) -> str:
        name, argument = placeholder.groups()
        if argument is not None:
            return spelling.mention(argument)
        if name == "where":
            return where
        if name == "option":
            return spelling.name(option or "an option")
        return " ".join(spelling.setting(*setting) for setting in (suggestion or {}).items())

    return _PLACEHOLDER.sub(value, template) if "{" in template else template
