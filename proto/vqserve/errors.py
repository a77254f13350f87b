"""All errors of vqserve, in one tree: the SDK, the server and the in-process `Tokenizer` raise them.

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
│   ├── Unauthenticated
│   └── PermissionDenied
├── Cancelled
├── ServerError
├── ProtocolError
├── Closed
├── StartError
└── CodebookError (also a ValueError)
    ├── CodebookFileError
    └── ForeignCheckpointError

An error consists of fields. Its text is made where it is shown (`VqserveError.text`). docs/errors.md has the table.
This module imports only the standard library and `text`, so that every other module can import it.
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

from vqserve.text import printable

ArrayName = Literal["latents", "indices", "tokens"]
"""The array that a position indexes: one of the caller's arrays, or the grid of their tokens."""
ARRAY_NAMES: tuple[str, ...] = get_args(ArrayName)

# {NAME=} stands for the argument NAME, for example {timeout=}.
# With one more brace before it (see `escape`), a placeholder stands for itself.
_PLACEHOLDER = re.compile(r"\{*\{(?:(where|option|suggestion)|([a-z_]{1,40})=)\}")

# There is no flag for a token: other users of the machine can read the flags of a process.
_NO_FLAG = {"token": "VQSERVE_TOKEN"}
# Values that a flag of their own stands for.
_FLAGS: dict[tuple[str, object], str] = {("batched", False): "--unbatched", ("batched", True): "no --unbatched"}

# Characters of a message about a file; a list of a thousand names of arrays has fewer.
_LONGEST_FOREIGN = 1 << 18


@dataclass(frozen=True)
class Spelling:
    """How an error text writes the arguments of a call: as in Python, or as on a command line."""

    is_command_line: bool = False

    def name(self, option: str) -> str:
        """Return `layout`, or `--layout`."""
        return _NO_FLAG.get(option, f"--{option.replace('_', '-')}") if self.is_command_line else option

    def mention(self, option: str) -> str:
        """Return `layout=`, or `--layout`."""
        return self.name(option) if self.is_command_line else f"{option}="

    def setting(self, option: str, value: object) -> str:
        """Return `layout="channels_last"`, or `--layout channels_last`."""
        if self.is_command_line:
            return _FLAGS.get((option, value)) or f"{self.name(option)} {value}"
        return f"{option}={json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)}"


PYTHON = Spelling()
COMMAND_LINE = Spelling(is_command_line=True)


class VqserveError(Exception):
    """Base of all errors that vqserve raises on purpose; they pickle with all their fields.

    Attributes:
        template: text with placeholders: {where} for the position, {option} and {suggestion} for the fields of these
            names, {timeout=} for the argument `timeout`, and so on.
        code: name of the gRPC status of the class, or of the status that the server sent, such as "NOT_FOUND"; None if
            gRPC has no status for it.
        target: address of the server; None in process.
        codebook: name of the codebook; None if it is not known or does not matter.
        digest: digest of that codebook; None if it does not matter.
        request_id: id of the failed request in the server's log; None if no request was sent.
        item: number of the array of `encode_many` or `decode_many` that failed, from 0; None in other calls.
        array: array that `position` indexes: "latents", "indices", or "tokens", which is the grid without the channels.
        position: index of the offending element, one number for each axis; None if the error is not about an element.
        row: number of the offending token in C order, until `placed` replaces it by a position.
        option: name of the argument that the error is about, as in Python.
        suggestion: arguments to try, by name.
        path: file of the offending array or codebook; it is never sent to a caller.
        hint: what to do about the error, with placeholders as in `template`; "" if the message says it.
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
        hint: str | None = None,
    ) -> None:
        # Pickling calls the class with `args`, here the template, and then restores the other fields.
        super().__init__(template)
        self.template = template
        self.code = code or self.default_code
        self.target = target
        self.codebook = codebook
        self.digest = digest
        self.request_id = request_id
        self.item = item
        self.array = array
        self.position = None if position is None else tuple(map(int, position))
        self.row = None if row is None else int(row)
        self.option = option
        self.suggestion = dict(suggestion or {})
        self.path = None if path is None else fspath(path)
        # Without one, the hint of the class counts.
        if hint is not None:
            self.hint = hint

    @property
    def message(self) -> str:
        """What went wrong and where: the text of `str` without the call and the hint."""
        return self.statement()

    @property
    def where(self) -> str:
        """The offending element: "latents[0, 3]", "token [7]"; without a position the array's name."""
        if self.position == ():
            # An array without axes has one element.
            return "the token" if self.array == "tokens" else self.array or "it"
        if self.position is None and self.row is None:
            return self.array or "it"
        name = "token " if self.array == "tokens" else self.array or "element "
        return f"{name}{list(self.position or (self.row,))}"

    def statement(self, spelling: Spelling = PYTHON) -> str:
        """Return what went wrong and where, with arguments written in this spelling."""
        stated = _filled(self.template, spelling, where=self.where, option=self.option, suggestion=self.suggestion)
        return stated if self.path is None else f"{self.path}: {stated}"

    def advice(self, spelling: Spelling = PYTHON) -> str:
        """Return what to do, with arguments written in this spelling; "" if the message says it."""
        return _filled(self.hint, spelling, option=self.option, suggestion=self.suggestion)

    def text(self, spelling: Spelling = PYTHON) -> str:
        """Return the whole text for a user: what went wrong, in which call, and what to do."""
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
        advice = self.advice(spelling)
        return f"{stated}{f' ({call})' if call else ''}{f': {advice}' if advice else ''}"

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.message!r})"

    def with_fields(self, **changes: Any) -> Self:
        """Return the same error with other values of some fields."""
        changed = copy.copy(self)
        vars(changed).update(changes)
        if "template" in changes:
            changed.args = (changes["template"],)
        return changed

    def noted(self, note: str) -> Self:
        """Return the same error with a note, after a semicolon."""
        return self.with_fields(template=f"{self.template}; {note}")

    def shifted(self, offset: Sequence[int]) -> Self:
        """Return an error about a part of an array as an error about the whole array.

        An error without a position, or with a position of another rank, is returned unchanged.

        Args:
            offset: start of the part in the whole array, one number for each axis.
        """
        if self.position is None or len(self.position) != len(offset):
            return self
        return self.with_fields(position=tuple(int(at + by) for at, by in zip(self.position, offset, strict=True)))

    def without_batch_axis(self) -> Self:
        """Return an error about an array to which a batch axis was added as one about the array without it."""
        return self if not self.position else self.with_fields(position=self.position[1:])

    def placed(self, grid: Sequence[int], start: int = 0) -> Self:
        """Return an error about a row as an error about a token in a grid; other errors are returned unchanged.

        Args:
            grid: shape of the tokens.
            start: number of the token, in C order, of row 0.
        """
        if self.row is None:
            return self
        row, position = self.row + start, [0] * len(grid)
        for axis in reversed(range(len(grid))):
            row, position[axis] = divmod(row, grid[axis])
        return self.with_fields(row=None, position=tuple(position))


@contextmanager
def rows_placed(grid: Sequence[int], start: int = 0) -> Iterator[None]:
    """Convert errors about rows that the block raises to errors about tokens in a grid; see `VqserveError.placed`."""
    try:
        yield
    except VqserveError as error:
        if error.row is None:
            raise
        raise error.placed(grid, start) from None


@contextmanager
def of_file(path: str | PathLike[str] | None) -> Iterator[None]:
    """Add a path to errors about an array that the block raises; None: the array is not in a file."""
    try:
        yield
    except InvalidArgument as error:
        if path is None or error.array is None or error.path is not None:
            raise
        raise error.with_fields(path=fspath(path)) from None


class LayoutWarning(UserWarning):
    """An array can be read in two ways; `suggestion` is the argument that selects one."""

    def __init__(self, template: str, suggestion: Mapping[str, str | int] | None = None) -> None:
        super().__init__(template)
        self.template = template
        self.suggestion = dict(suggestion or {})

    def text(self, spelling: Spelling = PYTHON) -> str:
        """Return the text for a user; see `VqserveError.text`."""
        return _filled(self.template, spelling, suggestion=self.suggestion)

    def __str__(self) -> str:
        return self.text()


class InvalidArgument(VqserveError, ValueError):
    """An array or an option is not valid: wrong shape, dtype, NaN, index out of range."""

    default_code = "INVALID_ARGUMENT"


class InvalidShape(InvalidArgument):
    """An array has the wrong rank, channel count or size."""


class InvalidDtype(InvalidArgument):
    """An array has an element type that cannot be served."""


class NotAnArray(InvalidDtype, TypeError):
    """A value is not an array with plain values: a list, a scalar, a masked array, a sparse tensor."""


class InvalidOption(InvalidArgument):
    """An option has a value that is not allowed."""


class NonFiniteLatents(InvalidArgument):
    """Latents hold NaN or infinity, or exceed float32's range after the codebook's projection."""

    hint = "no code stands for it, find out where it comes from"


class TokenBeyondRange(NonFiniteLatents):
    """A token exceeds float32's range after the codebook's projection."""

    hint = "scale the latents down"


class IndexOutOfRange(InvalidArgument):
    """An index is not in the vocabulary."""


class MessageTooLarge(InvalidArgument):
    """A message exceeds the limit of the client or of the server, or one row alone does."""


class CodebookNotFound(VqserveError, LookupError):
    """No codebook of that name is served, or the call names none and the server has several."""

    default_code = "NOT_FOUND"


class DigestMismatch(VqserveError):
    """The codebook has another digest than the pinned one; `digest` is the codebook's."""

    default_code = "FAILED_PRECONDITION"
    hint = "pin that digest with {digest=}, or serve the old codebook again"


class DigestChanged(VqserveError):
    """The codebook was replaced during the call; a result never mixes the tokens of two codebooks."""

    default_code = "FAILED_PRECONDITION"
    hint = "call again to use the new codebook for all arrays"


class Overloaded(VqserveError):
    """The server's queue is full; the SDK raises this after its last retry.

    Attributes:
        retry_after_s: delay before a retry that the server asks for, in seconds; None if it gave none.
    """

    default_code = "RESOURCE_EXHAUSTED"
    hint = "try again later, or with fewer requests at once"

    def __init__(self, template: str = "", *, retry_after_s: float | None = None, **fields: Any) -> None:
        super().__init__(template, **fields)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(VqserveError, TimeoutError):
    """The call did not end within its timeout."""

    default_code = "DEADLINE_EXCEEDED"
    hint = "allow more time with {timeout=}; `vqserve status` shows whether the server is serving"


class Unavailable(VqserveError, ConnectionError):
    """The server cannot be reached or is stopping; the SDK raises this after its last retry."""

    default_code = "UNAVAILABLE"


class Draining(Unavailable):
    """The server is stopping and takes no new requests."""

    hint = "try again when this or another server is available"


class DeviceBroken(Unavailable):
    """The device failed; this server process cannot serve any longer."""

    hint = "try again after the server was restarted"


class AccessDenied(VqserveError):
    """The server does not accept this caller, or not for what it asks."""

    default_code = "PERMISSION_DENIED"


class Unauthenticated(AccessDenied):
    """The server needs a token, and the caller has none that is valid."""

    default_code = "UNAUTHENTICATED"
    hint = "call with a valid {token=} or {token_file=}; the server's operator makes one with `vqserved token`"


class PermissionDenied(AccessDenied):
    """The caller's token is valid, but not for this codebook."""

    hint = "the codebooks that the server lists are those that the token may use"


class Cancelled(VqserveError):
    """The caller cancelled the call or disconnected, or a proxy cancelled the call."""

    default_code = "CANCELLED"


class ServerError(VqserveError):
    """The server failed; its log gives the reason with the request id."""

    default_code = "INTERNAL"


class ProtocolError(VqserveError):
    """A reply does not fit its request, or the server does not implement vqserve.v1; the reply was not used."""

    hint = "are client and server of the same version?"


class Closed(VqserveError):
    """The client or the tokenizer was closed, or a generator was carried into a forked process."""

    hint = "make a new one"


class StartError(VqserveError):
    """The daemon cannot start; the text gives the reason in one line."""


class CodebookError(VqserveError, ValueError):
    """A codebook cannot be used."""


class CodebookFileError(CodebookError):
    """A codebook file is damaged, inconsistent or of an unknown version."""


class ForeignCheckpointError(CodebookError):
    """A foreign checkpoint cannot be read, or does not contain enough to be imported.

    The text has names that a stranger chose: it is shown in one line, printable, of bounded length, and has no
    placeholders.
    """

    def __init__(self, text: str = "", **fields: Any) -> None:
        super().__init__(escape(printable(text, _LONGEST_FOREIGN)), **fields)
        self.args = (text,)


def _filled(
    template: str,
    spelling: Spelling,
    *,
    where: str = "",
    option: str | None = None,
    suggestion: Mapping[str, object] | None = None,
) -> str:
    # One pass: placeholders in the inserted values are not replaced.
    def value(placeholder: re.Match[str]) -> str:
        if placeholder[0].startswith("{{"):
            return placeholder[0][1:]
        name, argument = placeholder.groups()
        if argument is not None:
            return spelling.mention(argument)
        if name == "where":
            return where
        if name == "option":
            return spelling.name(option or "an option")
        return " ".join(spelling.setting(*setting) for setting in (suggestion or {}).items())

    return _PLACEHOLDER.sub(value, template) if "{" in template else template


def escape(text: str) -> str:
    """Return text from outside so that it stands in a template as it is, with whatever it has in braces."""
    return _PLACEHOLDER.sub(lambda placeholder: "{" + placeholder[0], text) if "{" in text else text


def quoted(value: object, most: int = 40) -> str:
    """Return the repr of a value from outside for a template, cut to `most` characters."""
    return escape(repr(value)[:most])
