"""Constructor arguments as a codebook file holds them: their types, their meaning, and how they are checked.

Every class of quantizer lists its own in the attribute `arguments`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vqserve.layout import Layout
from vqserve.validation import LARGEST_VOCABULARY

# An index is sent as an unsigned number of at most 32 bits.
# Wider rows or projections than this come from an overflow, not from a training.
MAX_CHANNELS = 1 << 31


class ArgumentError(ValueError):
    """A constructor argument is missing, unknown or not of its type."""


@dataclass(frozen=True)
class Argument:
    """One constructor argument.

    Attributes:
        check: returns the value in the form in which it is kept, or raises ArgumentError.
        served: whether encode or decode depend on it. Such an argument belongs to the digest.
        default: the value of a file that does not give it.
        optional: whether a file may leave it out. If it is also served, it is left out of the digest while it equals
            its default, so older files keep their digest.
        attribute: the quantizer's attribute that holds it, with dots for attributes of attributes; empty: the
            argument's own name.
    """

    check: Callable[[object], object]
    served: bool = False
    default: object = None
    optional: bool = True
    attribute: str = ""


def served(check: Callable[[object], object], attribute: str = "") -> Argument:
    """Return an argument that encode or decode depend on and that every file gives."""
    return Argument(check, served=True, optional=False, attribute=attribute)


def integer(low: int, high: int) -> Callable[[object], object]:
    """Return the check of an integer in [low, high]."""

    def check(value: object) -> object:
        if type(value) is not int or not low <= value <= high:
            raise ArgumentError(f"must be an integer in [{low}, {high}]")
        return value

    return check


def number(value: object) -> object:
    """Check a finite number, and return it as a float."""
    # An integer too large for a float would raise OverflowError in float().
    if type(value) not in {int, float} or not abs(value) <= _LARGEST_FLOAT:  # type: ignore[arg-type]
        raise ArgumentError("must be a finite number")
    return float(value)  # type: ignore[arg-type]


def choice(*values: object) -> Callable[[object], object]:
    """Return the check of a value that is one of these."""

    def check(value: object) -> object:
        # Not `in`: JSON's lists and objects have no hash, and true equals 1.
        if not any(type(value) is type(known) and value == known for known in values):
            raise ArgumentError(f"must be one of {', '.join(json.dumps(known) for known in values)}")
        return value

    return check


def flag(value: object) -> object:
    """Check a boolean."""
    if type(value) is not bool:
        raise ArgumentError("must be true or false")
    return value


def text(value: object) -> object:
    """Check a string."""
    if type(value) is not str:
        raise ArgumentError("must be text")
    return value


def check_unknown_index(value: object) -> object:
    """Return the value if it is "random", "extra" or an integer that an index can carry.

    Raises:
        ArgumentError: for any other.
    """
    if value in ("random", "extra") or (type(value) is int and 0 <= value < LARGEST_VOCABULARY):
        return value
    raise ArgumentError(f'must be "random", "extra" or an integer in [0, {LARGEST_VOCABULARY})')


def check_layout(value: object) -> object:
    """Check the name of a layout, or None, and return it as a plain string."""
    return _layout_name(str(value) if isinstance(value, Layout) else value)


def _optional_channels(value: object) -> object:
    return None if value is None else integer(1, MAX_CHANNELS)(value)


_LARGEST_FLOAT = math.ldexp(2 - 2**-52, 1023)
_layout_name = choice(None, *map(str, Layout))

# What several kinds have in common.
CODES = served(integer(1, LARGEST_VOCABULARY), "num_codes")
CODE_DIM = served(integer(1, MAX_CHANNELS), "code_dim")
INPUT_DIM = served(integer(1, MAX_CHANNELS), "input_dim")
MAYBE_CHANNELS = served(_optional_channels)
FLAG = served(flag)
UNKNOWN_INDEX = served(check_unknown_index, "given_unknown_index")
LAYOUT = Argument(check_layout, served=True)
LOSS_KEY = Argument(text, default="loss/vq")
OUTPUT_PROJECTION: Mapping[str, Argument] = {"output_dim": served(_optional_channels, "projected_output_dim")}
PROJECTIONS: Mapping[str, Argument] = {
    "input_dim": served(_optional_channels, "projected_input_dim"),
    **OUTPUT_PROJECTION,
}


def check_arguments(kind: str, known: Mapping[str, Argument], given: Mapping[str, object]) -> dict[str, object]:
    """Return all the arguments of a kind, in the constructor's order.

    Args:
        kind: for messages.
        known: the kind's arguments.
        given: by name; optional ones may be missing.

    Raises:
        ArgumentError: one is unknown, missing or not of its type.
    """
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ArgumentError(f"argument {unknown[0]!r} is not one of kind {kind!r}: {', '.join(known)}")
    checked: dict[str, object] = {}
    for name, argument in known.items():
        if name not in given:
            if not argument.optional:
                raise ArgumentError(f"argument {name!r} is missing")
            checked[name] = argument.default
            continue
        try:
            checked[name] = argument.check(given[name])
        except ArgumentError as error:
            raise ArgumentError(f"argument {name!r} is {_shown(given[name])}, it {error}") from None
    return checked


def written_arguments(known: Mapping[str, Argument], arguments: Mapping[str, object]) -> dict[str, object]:
    """Return the arguments that a file gives: without those that older readers do not know, at their defaults."""
    return {
        name: value
        for name, value in arguments.items()
        if not (known[name].served and known[name].optional and value == known[name].default)
    }


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
