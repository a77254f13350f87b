"""The constructor arguments that a codebook file carries: which each kind has, their types and their meaning."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import get_args

from vqserve.layout import Layout
from vqserve_server.quantizers.fsq import MAX_LEVEL
from vqserve_server.quantizers.fsq_boundaries import Bound
from vqserve_server.quantizers.lfq import MAX_BITS, BitOrder
from vqserve_server.quantizers.residual_structure import MAX_QUANTIZERS, Metric

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
        served: whether encode or decode depend on it. Such an argument belongs to the digest.
        default: what stands for it in a file that does not give it.
        optional: whether a file may leave it out. One that is served too is no part of the digest at its default, so
            that files from before it keep theirs.
    """

    check: Callable[[object], object]
    served: bool = False
    default: object = None
    optional: bool = True


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


def _count(value: object) -> object:
    if type(value) is not int or not 0 <= value <= MAX_QUANTIZERS:
        raise ArgumentError(f"must be an integer in [0, {MAX_QUANTIZERS}]")
    return value


def _choice(*values: object) -> Callable[[object], object]:
    def check(value: object) -> object:
        # Not `in`: JSON's lists and objects have no hash, and true equals 1.
        if not any(type(value) is type(known) and value == known for known in values):
            raise ArgumentError(f"must be one of {', '.join(json.dumps(known) for known in values)}")
        return value

    return check


def _levels(value: object) -> object:
    if not isinstance(value, list) or not all(type(level) is int and 2 <= level <= MAX_LEVEL for level in value):
        raise ArgumentError(f"must be a list of integers in [2, {MAX_LEVEL}]")
    # The length first: a product of very many numbers takes long.
    if not 1 <= len(value) <= MAX_BITS or math.prod(value) > MAX_VOCABULARY:
        raise ArgumentError(f"must have a product in [2, {MAX_VOCABULARY}]")
    return value


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
_CODES = Argument(_size(MAX_VOCABULARY), served=True, optional=False)
_CHANNELS = Argument(_size(MAX_CHANNELS), served=True, optional=False)
_MAYBE_CHANNELS = Argument(_optional_channels, served=True, optional=False)
_FLAG = Argument(_flag, served=True, optional=False)
_UNKNOWN_INDEX = Argument(check_unknown_index, served=True, optional=False)
_LAYOUT_CHECK = _choice(None, *map(str, Layout))
_LAYOUT = Argument(_LAYOUT_CHECK, served=True)
_LOSS_KEY = Argument(_text, default="loss/vq")
_VECTOR: Mapping[str, Argument] = {
    "unknown_index": _UNKNOWN_INDEX,
    "sane_index_shape": Argument(_flag, default=False),
    "log_perplexity": Argument(_flag, default=False),
    "embedding_weight_norm": _FLAG,
    "loss_key": _LOSS_KEY,
    "layout": _LAYOUT,
}
_PROJECTIONS: Mapping[str, Argument] = {"input_dim": _MAYBE_CHANNELS, "output_dim": _MAYBE_CHANNELS}

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
        "layout": _LAYOUT,
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
        "layout": _LAYOUT,
    },
    "vq_projection": {
        "input_dim": _CHANNELS,
        "n_codes": _CODES,
        "codebook_dim": _CHANNELS,
        "beta": Argument(_number, default=1.0),
        "output_dim": _MAYBE_CHANNELS,
        **_VECTOR,
    },
    "cosine": {
        "n_e": _CODES,
        "e_dim": _CHANNELS,
        "decode_normalized": _FLAG,
        **_PROJECTIONS,
        "unknown_index": _UNKNOWN_INDEX,
        "layout": _LAYOUT,
    },
    "dot": {"n_e": _CODES, "e_dim": _CHANNELS, **_PROJECTIONS, "unknown_index": _UNKNOWN_INDEX, "layout": _LAYOUT},
    "rvq": {
        "num_quantizers": Argument(_size(MAX_QUANTIZERS), served=True, optional=False),
        "n_e": _CODES,
        "e_dim": _CHANNELS,
        "input_dim": _CHANNELS,
        "metric": Argument(_choice(*get_args(Metric)), served=True, optional=False),
        "decode_normalized": _FLAG,
        "stage_projections": _FLAG,
        "inner_dim": _MAYBE_CHANNELS,
        "groups": Argument(_size(MAX_QUANTIZERS), served=True, optional=False),
        "first_quantizers": Argument(_count, served=True, optional=False),
        # Whoever reads the file should not have to know what residual codebooks usually have.
        "layout": Argument(_LAYOUT_CHECK, served=True, optional=False),
    },
    "fsq": {
        "levels": Argument(_levels, served=True, optional=False),
        "bound": Argument(_choice(*get_args(Bound)), served=True, optional=False),
        **_PROJECTIONS,
        "layout": _LAYOUT,
    },
    "lfq": {
        "bits": Argument(_size(MAX_BITS), served=True, optional=False),
        "bit_order": Argument(_choice(*get_args(BitOrder)), served=True, optional=False),
        "spherical": _FLAG,
        **_PROJECTIONS,
        "layout": _LAYOUT,
    },
}


def check_arguments(kind: str, given: Mapping[str, object]) -> dict[str, object]:
    """Return all the arguments of a kind, in the constructor's order.

    Args:
        kind: a key of `ARGUMENTS`.
        given: by name; optional ones may be missing.

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
            if not argument.optional:
                raise ArgumentError(f"argument {name!r} is missing")
            checked[name] = argument.default
            continue
        try:
            checked[name] = argument.check(given[name])
        except ArgumentError as error:
            raise ArgumentError(f"argument {name!r} is {_shown(given[name])}, it {error}") from None
    return checked


def served_arguments(kind: str, arguments: Mapping[str, object], *, remapped: bool) -> dict[str, object]:
    """Return the arguments that encode and decode depend on, in the form that the digest has them.

    Without a remap `unknown_index` is not one of them. With one, in a Gumbel codebook only the codes in use compete,
    so that nothing unknown is ever reported: there it matters only whether decode takes the extra index.
    """
    served = {name: value for name, value in written_arguments(kind, arguments).items() if ARGUMENTS[kind][name].served}
    if not remapped:
        served.pop("unknown_index", None)
    elif kind == "gumbel" and served["unknown_index"] != "extra":
        served["unknown_index"] = "random"
    return served


def written_arguments(kind: str, arguments: Mapping[str, object]) -> dict[str, object]:
    """Return the arguments that a file gives: all but those that a reader from before them would not know."""
    known = ARGUMENTS[kind]
    return {
        name: value
        for name, value in arguments.items()
        if not (known[name].served and known[name].optional and value == known[name].default)
    }


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
