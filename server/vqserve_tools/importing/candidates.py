"""Arrays of a file that may be its codebook, likely ones first, as options of the next command."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from vqserve_server.quantizers.inference.residual import MAX_QUANTIZERS
from vqserve_tools.importing.families.checkpoint import listed, places_of, shape_text
from vqserve_tools.importing.families.name_lists import keys_text, prefix_text
from vqserve_tools.importing.families.names import is_part, is_running, numbered_siblings
from vqserve_tools.importing.families.taming import CODES
from vqserve_tools.importing.files import ForeignArray

# The projection of quantizers whose codes are computed.
_PROJECTED = "project_in.weight"
# Words in the names of codebooks.
_WORDS = ("codebook", "dictionary", "embed", "vq", "quant", "codes")
_NO_CODES = (
    "it has no array of two axes: for finite scalar or lookup-free quantization, which have no codebook, pass for "
    "example --kind fsq --levels 8,8,8,5,5,5 or --kind lfq --bits 18"
)


def candidates_text(arrays: Mapping[str, ForeignArray]) -> str:
    """Return the arrays that may be the codebook, each as options with its shape, in one line.

    Arrays with a codebook's name come first, and are all that is listed if there are any; running sums, moments of an
    optimizer and parts such as projections come last. Arrays that differ in a number only are offered as stages.
    """
    found = [name for name, array in arrays.items() if _may_be_codes(array)]
    matrices = [name for name in found if len(arrays[name].shape) == 2]
    likeness = {name: _likeness(name) for name in found}
    likely = [name for name in found if likeness[name]]
    projected = sorted(
        place for place in places_of(arrays, _PROJECTED) if len(arrays[f"{place}{_PROJECTED}"].shape) == 2
    )
    if projected and not likely:
        return _grid_text(f"{projected[0]}{_PROJECTED}", arrays)
    chosen = sorted(likely or matrices or found, key=lambda name: (-likeness[name], *_rank(name, arrays[name].shape)))
    if not chosen:
        return _NO_CODES
    shapes = {name: arrays[name].shape for name in chosen}
    siblings_of = numbered_siblings(shapes)
    options, listed_before = [], set[str]()
    for name in chosen:
        if name in listed_before:
            continue
        shape, siblings = shapes[name], siblings_of[name]
        if 1 < len(siblings) <= MAX_QUANTIZERS and len(shape) == 2 and likeness[name]:
            listed_before.update(siblings)
            each = ", ".join(dict.fromkeys(shape_text(shapes[sibling]) for sibling in siblings))
            options.append(f"{keys_text(siblings)} ({len(siblings)} stages of {each})")
        else:
            options.append(f"{_option(name, shape)} ({shape_text(shape)})")
    others = len(found) - len(chosen)
    rest = f"; --dry-run lists all arrays, {others} more may be it" if others else ""
    return f"name the codebook, likely ones first: {listed(options)}{rest}"


def _grid_text(name: str, arrays: Mapping[str, ForeignArray]) -> str:
    shape = arrays[name].shape
    return (
        f"{name} ({shape_text(shape)}) is of a quantizer without a codebook: pass --kind fsq or --kind residual_fsq "
        f"with --levels, {shape[0]} numbers of the model's configuration, or --kind lfq with --bits {shape[0]}; if the "
        "codebook is another array, name it with --key (--dry-run lists all)"
    )


def _may_be_codes(array: ForeignArray) -> bool:
    is_float = "float" in array.dtype or array.dtype[:2] in ("<f", ">f")
    return is_float and len(array.shape) in (2, 3) and all(array.shape)


def _likeness(name: str) -> int:
    """Return how many words of a codebook's name an array has; none if it is a part or a running sum."""
    lower = name.lower()
    words = sum(word in lower for word in _WORDS)
    if not words or is_running(name) or any(map(is_part, name.split("."))):
        return 0
    return words


def _rank(name: str, shape: tuple[int, ...]) -> tuple[bool, bool, bool, Sequence[str | int]]:
    rows, columns = shape[-2:]
    number = [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
    return is_running(name), len(shape) == 3, rows < columns, number


def _option(name: str, shape: Sequence[int]) -> str:
    place = next((place for ending in CODES for place in places_of([name], ending)), "")
    if place:
        return prefix_text(place)
    key = keys_text([name])
    return key if len(shape) == 2 else f"{key} --kind rvq or {key} --groups"
