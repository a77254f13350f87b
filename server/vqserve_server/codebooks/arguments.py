"""The constructor arguments that a codebook file carries: which each kind has, their types and their meaning."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# An index travels as an unsigned 32-bit number at most.
MAX_VOCABULARY = 1 << 32
# Wider rows or projections than this have overflowed somewhere, or never were trained.
MAX_CHANNELS = 1 << 31


class ArgumentError(ValueError):
    """A constructor argument is missing, unknown or not of its type."""


@dataclass(frozen=True)
class Argument:
    """One constructor argument.

    Attributes:
        check: returns the value in the form in which it is kept, or raises ArgumentError.
        served: whether encode or decode depend on it. Such an argument must be given and belongs to the digest.
        default: what stands for it in a file that does not give it; served arguments have none.
    """

    check: Callable[[object], object]
    served: bool = False
    default: object = None


def _size(limit: int) -> Callable[[object], object]:
    def check(value: object) -> object:
        if type(value) is not int or not 1 <= value <= limit:
            raise ArgumentError(f"must be an integer in [1, {limit}]")
        return value

    return check


def _optional_channels(value: object) -> object:
    return None if value is None else _size(MAX_CHANNELS)(value)


def _number(value: object) -> object:
    # An integer too large for a float would raise OverflowError in float().
    if type(value) not in {int, float} or not abs(value) <= _LARGEST_FLOAT:  # type: ignore[arg-type]
        raise ArgumentError("must be a finite number")
    return float(value)  # type: ignore[arg-type]


def _flag(value: object) -> object:
    if type(value) is not bool:
        raise ArgumentError("must be true or false")
    return value


def _text(value: object) -> object:
    if type(value) is not str:
        raise ArgumentError("must be text")
    return value


def check_unknown_index(value: object) -> object:
    """Return the value if it is "random", "extra" or an integer that an index can carry.

    Raises:
        ArgumentError: for any other.
    """
    if value in ("random", "extra") or (type(value) is int and 0 <= value < MAX_VOCABULARY):
        return value
    raise ArgumentError(f'must be "random", "extra" or an integer in [0, {MAX_VOCABULARY})')


_LARGEST_FLOAT = math.ldexp(2 - 2**-52, 1023)
_CODES = Argument(_size(MAX_VOCABULARY), served=True)
_CHANNELS = Argument(_size(MAX_CHANNELS), served=True)
_UNKNOWN_INDEX = Argument(check_unknown_index, served=True)
_LOSS_KEY = Argument(_text, default="loss/vq")
_VECTOR: Mapping[str, Argument] = {
    "unknown_index": _UNKNOWN_INDEX,
    "sane_index_shape": Argument(_flag, default=False),
    "log_perplexity": Argument(_flag, default=False),
    "embedding_weight_norm": Argument(_flag, served=True),
    "loss_key": _LOSS_KEY,
}

ARGUMENTS: Mapping[str, Mapping[str, Argument]] = {
    "vq": {"n_e": _CODES, "e_dim": _CHANNELS, "beta": Argument(_number, default=0.25), **_VECTOR},
    "ema": {
        "n_embed": _CODES,
        "embedding_dim": _CHANNELS,
        # The constructor has no default: this is the original paper's (https://arxiv.org/abs/1711.00937).
        "beta": Argument(_number, default=0.25),
        "decay": Argument(_number, default=0.99),
        "eps": Argument(_number, default=1e-5),
        "unknown_index": _UNKNOWN_INDEX,
        "loss_key": _LOSS_KEY,
    },
    "gumbel": {
        "num_hiddens": _CHANNELS,
        "embedding_dim": _CHANNELS,
        "n_embed": _CODES,
        "straight_through": Argument(_flag, default=True),
        "kl_weight": Argument(_number, default=5e-4),
        "temp_init": Argument(_number, default=1.0),
        "unknown_index": _UNKNOWN_INDEX,
        "loss_key": _LOSS_KEY,
    },
    "vq_projection": {
        "input_dim": _CHANNELS,
        "n_codes": _CODES,
        "codebook_dim": _CHANNELS,
        "beta": Argument(_number, default=1.0),
        "output_dim": Argument(_optional_channels, served=True),
        **_VECTOR,
    },
}


def check_arguments(kind: str, given: Mapping[str, object]) -> dict[str, object]:
    """Return all the arguments of a kind, in the constructor's order.

    Args:
        kind: a key of `ARGUMENTS`.
        given: by name; those that only training reads may be missing.

    Raises:
        ArgumentError: one is unknown, missing or not of its type.
    """
    known = ARGUMENTS[kind]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ArgumentError(f"argument {unknown[0]!r} is not one of kind {kind!r}: {', '.join(known)}")
    checked: dict[str, object] = {}
    for name, argument in known.items():
        if name not in given:
            if argument.served:
                raise ArgumentError(f"argument {name!r} is missing")
            checked[name] = argument.default
            continue
        try:
            checked[name] = argument.check(given[name])
        except ArgumentError as error:
            raise ArgumentError(f"argument {name!r} is {_shown(given[name])}, it {error}") from None
    return checked


def served_arguments(kind: str, arguments: Mapping[str, object], *, remapped: bool) -> dict[str, object]:
    """Return the arguments that encode and decode depend on.

    Without a remap `unknown_index` is not one of them. With one, in a Gumbel codebook only the codes in use compete,
    so that nothing unknown is ever reported: there it matters only whether decode takes the extra index.
    """
    served = {name: arguments[name] for name, argument in ARGUMENTS[kind].items() if argument.served}
    if not remapped:
        del served["unknown_index"]
    elif kind == "gumbel" and served["unknown_index"] != "extra":
        served["unknown_index"] = "random"
    return served


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
