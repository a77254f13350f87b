"""What the name of an array says about it: running averages, parts of a quantizer, modules of a quantizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

# Sums and moments that training keeps; not codes.
_RUNNING = re.compile(
    r"_?ema_\w+|(?:\w*_)?avg(?:_sq)?|(?:\w*_)?sum|(?:max_)?exp_(?:avg|inf)\w*|momentum_buffer|"
    r"(?:\w*_)?cluster_(?:size|usage)"
)
# Flags and counters that encode and decode do not read.
_STATE = re.compile(r"_?init+(?:ed|ialized)|codebook_us(?:ed|age)|vocab_usage|embed_prob")
_OPTIMIZER = re.compile(r"(?:^|\.)optimizers?(?:_states?)?\.")
_PART = re.compile(
    r"proj\w*|\w*_projs?|codebook_(?:norm|mlp|scale|bias)|\w*_project|\w*_projection|code_transform|quant_resi|used|mask|scales?|bias|\w*rot(?:ation)?"
)
_MODULE = re.compile(r"quanti[sz]|(?:^|_)(?:quant|r?vqs?|rq|r?lfq|r?fsq|bsq|ibq|codebooks?)(?:_|\d|$)|^regularization$")
_LAYER = re.compile(r"conv|proj|^(?:pre|post)_")
_TABLE = re.compile(r"_?(?:embed|embeddings?|codebooks?|codes|dictionary)")
_NAMED_TABLE = re.compile(r"(?:^|_)(?:codebooks?|dictionary)$")
_PROJECTION = re.compile(r"project_(?:in|out)|proj_(?:in|out)|(?:in|out)(?:put)?_(?:proj|project)")
_NUMBER = re.compile(r"\d+")
# A module with one of these inside is a whole model, whatever its name is.
_MODEL = re.compile(r"(?:^|[._])(?P<name>(?:en|de)coder)")


def is_running(name: str) -> bool:
    """Return whether an array is a running sum, a moment of an optimizer or a counter: encode never reads it."""
    last = name.rpartition(".")[2]
    return bool(_RUNNING.fullmatch(last) or _STATE.fullmatch(last) or _OPTIMIZER.search(name))


def is_part(name: str) -> bool:
    """Return whether a name, seen from the module that holds it, is a part of a quantizer beside its codes."""
    return bool(_PART.fullmatch(name.partition(".")[0]))


def is_projection(name: str) -> bool:
    """Return whether an array is of a layer with the name of a projection to or from codes."""
    return any(map(_PROJECTION.fullmatch, name.split(".")))


def owner_of(name: str) -> str:
    """Return the prefix of the module that holds an array; a `weight` belongs to the module around its layer."""
    return "".join(name.removesuffix(".weight").rpartition(".")[:2])


def missing_before(name: str, names: Iterable[str]) -> str:
    """Return the numbered module of a quantizer that holds an array, if no module before it is there; else "".

    Args:
        name: name of the array.
        names: names of all arrays.
    """
    parts = name.split(".")
    for place, part in enumerate(parts[1:], 1):
        is_stage = _NUMBER.fullmatch(part) and any(map(_MODULE.search, parts[:place]))
        if is_stage and int(part) > 0:
            siblings = ".".join(parts[:place]) + "."
            numbers = {other.removeprefix(siblings).partition(".")[0] for other in names if other.startswith(siblings)}
            if not any(_NUMBER.fullmatch(number) and int(number) < int(part) for number in numbers):
                return siblings + part
    return ""


class Modules:
    """The modules of a file, by the names of its arrays."""

    def __init__(self, names: Iterable[str]) -> None:
        self._models: set[str] = set()
        for name in names:
            ends = [match.end("name") for match in _MODEL.finditer(name)]
            if ends:
                self._models.update(prefix for prefix in _prefixes(name) if len(prefix) < ends[-1])

    def is_model(self, prefix: str) -> bool:
        """Return whether a module is a whole model: it has an encoder or a decoder inside."""
        return prefix in self._models

    def quantizer_of(self, name: str) -> str | None:
        """Return the prefix of the quantizer that an array, or all below a prefix, belongs to.

        It is the outermost enclosing module with a quantizer's name (quantize, quantizer, vq, regularization and the
        like) that is not a whole model.

        Args:
            name: name of an array, or a prefix that ends in a dot.

        Returns:
            The prefix, which ends in a dot; None if no module around the array has such a name.
        """
        for prefix in _prefixes(name)[1:]:
            component = prefix[:-1].rpartition(".")[2]
            if _MODULE.search(component) and not _LAYER.search(component) and prefix not in self._models:
                return prefix
        return None

    def may_be_codes(self, name: str) -> bool:
        """Return whether an array is a table of codes by its name: in a quantizer's module, or named codebook."""
        last = name.removesuffix(".weight").rpartition(".")[2]
        in_quantizer = self.quantizer_of(name) is not None
        return bool(_NAMED_TABLE.search(last) or (in_quantizer and _TABLE.fullmatch(last)))


def _prefixes(name: str) -> list[str]:
    """Return the prefixes of all modules around an array, the empty one of the file first."""
    return ["", *(name[: position + 1] for position, character in enumerate(name) if character == ".")]


def numbered_siblings(shapes: Mapping[str, tuple[int, ...]], *, width_axis: int = -1) -> dict[str, list[str]]:
    """Return for every array those of its width whose names differ from its own in numbers only, in their order.

    Stages may differ in the number of codes.

    Args:
        shapes: shapes of arrays by name.
        width_axis: axis of the codes' width in arrays of two axes.
    """
    groups: dict[tuple[str, int, tuple[int, ...]], list[str]] = {}
    for name, shape in shapes.items():
        sizes = (shape[width_axis],) if len(shape) == 2 else shape
        groups.setdefault((_NUMBER.sub("0", name), len(shape), sizes), []).append(name)
    for group in groups.values():
        group.sort(key=lambda name: [int(number) for number in _NUMBER.findall(name)])
    return {name: group for group in groups.values() for name in group}
