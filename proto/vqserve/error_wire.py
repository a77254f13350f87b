"""Writes an error as one entry of a failed call's trailing metadata, and reads it; docs/wire.md has the format.

Entries are short and printable ASCII, and never contain a path. The reader trusts nothing: it takes only fields of the
right type and size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from vqserve import errors
from vqserve.errors import VqserveError
from vqserve.text import LONGEST_NAME

ERROR_KEY = "vqserve-error"
REQUEST_ID_KEY = "vqserve-request-id"
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
# Names of the retry hint: gRPC's own, and the name that older clients read.
RETRY_PUSHBACK_KEY = "grpc-retry-pushback-ms"
RETRY_AFTER_KEY = "vqserve-retry-after-ms"

# The entry is an HTTP/2 header, and gRPC accepts 8 KiB of headers in all.
MAX_BYTES = 2048
_LONGEST_MESSAGE = 1000
_MOST_AXES = 32
_MOST_SUGGESTIONS = 8
_LARGEST = 1 << 63
# Fields that can be long.
_LONG = frozenset({"message", "hint", "suggestion", "codebook"})


def reason_of(kind: type[VqserveError]) -> str:
    """Return "invalid_shape" for InvalidShape."""
    return "".join(f"_{char.lower()}" if char.isupper() else char for char in kind.__name__).removeprefix("_")


# The errors that a server sends; the others occur only in the SDK, or are internal to the server.
KINDS: Mapping[str, type[VqserveError]] = MappingProxyType(
    {
        reason_of(kind): kind
        for kind in (
            errors.InvalidArgument,
            errors.InvalidShape,
            errors.InvalidDtype,
            errors.NotAnArray,
            errors.InvalidOption,
            errors.NonFiniteLatents,
            errors.TokenBeyondRange,
            errors.IndexOutOfRange,
            errors.MessageTooLarge,
            errors.CodebookNotFound,
            errors.DigestMismatch,
            errors.Overloaded,
            errors.DeadlineExceeded,
            errors.Unavailable,
            errors.Draining,
            errors.DeviceBroken,
            errors.Unauthenticated,
            errors.PermissionDenied,
            errors.Cancelled,
        )
    }
)


def written(error: VqserveError) -> str | None:
    """Return the entry of an error; None if errors of its class are not sent."""
    reason = reason_of(type(error))
    if reason not in KINDS:
        return None
    fields: dict[str, object] = {
        "reason": reason,
        "message": error.template,
        # The reader has the hints of the classes.
        "hint": None if error.hint == type(error).hint else error.hint,
        "array": error.array,
        "position": error.position,
        "option": error.option,
        "suggestion": error.suggestion,
        "codebook": error.codebook,
        "digest": error.digest,
    }
    present = {name: value for name, value in fields.items() if value not in (None, {})}
    text = _encoded(present)
    # An entry without the long fields still has the reason and the position; the status details have a text too.
    return text if len(text) <= MAX_BYTES else _encoded({name: present[name] for name in present.keys() - _LONG})


def _encoded(fields: Mapping[str, object]) -> str:
    # JSON leaves DEL as it is, and a header may not have it.
    return json.dumps(fields, separators=(",", ":")).replace("\x7f", "\\u007f")


def read(entry: str | None, *, code: str) -> VqserveError | None:
    """Return the error in an entry.

    Args:
        entry: the received entry; None if there was none.
        code: name of the received status.

    Returns:
        The error; None if there is no valid entry, or if its error does not have this status. The template is empty if
        the entry has no message that can be shown.
    """
    if entry is None or len(entry) > 2 * MAX_BYTES:
        return None
    try:
        fields = json.loads(entry)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or not isinstance(fields.get("reason"), str):
        return None
    kind = KINDS.get(fields["reason"])
    if kind is None or kind.default_code != code:
        return None
    taken = {name: fields[name] for name, is_good in _FIELDS.items() if name in fields and is_good(fields[name])}
    return kind(taken.pop("message", ""), code=code, **taken)


def _is_text(value: object, longest: int = LONGEST_NAME) -> bool:
    return isinstance(value, str) and 0 < len(value) <= longest and value.isprintable()


def _is_number(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < _LARGEST


def _is_option(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 40 and value.isascii() and value.isidentifier()


def _is_position(value: object) -> bool:
    return isinstance(value, list) and 0 < len(value) <= _MOST_AXES and all(map(_is_number, value))


def _is_suggestion(value: object) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= _MOST_SUGGESTIONS
        and all(_is_option(name) and (_is_text(one) or _is_number(one, -_LARGEST)) for name, one in value.items())
    )


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


_FIELDS: Mapping[str, Callable[[Any], bool]] = MappingProxyType(
    {
        "message": lambda value: _is_text(value, _LONGEST_MESSAGE),
        "hint": lambda value: value == "" or _is_text(value, _LONGEST_MESSAGE),
        "array": lambda value: isinstance(value, str) and value in errors.ARRAY_NAMES,
        "position": _is_position,
        "option": _is_option,
        "suggestion": _is_suggestion,
        "codebook": _is_text,
        "digest": _is_digest,
    }
)
