"""Lookup-free quantization: bits from a mask or from the options, and optional projections.

The mask of powers of two is the only sign of this quantizer in checkpoints of vector-quantize-pytorch (most significant
bit first) and Open-MAGVIT2 (least significant bit first); many have none.
"""

from __future__ import annotations

from collections.abc import Mapping

from vqserve.errors import ForeignCheckpointError
from vqserve_server.quantizers.scalar import MAX_BITS, BitOrder
from vqserve_tools.importing.families.checkpoint import Checkpoint, layer_names, places_of
from vqserve_tools.importing.families.family import Family, Reading
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.families.tables import projections_to
from vqserve_tools.importing.files import ForeignArray

_MASK = "mask"
_NAMES = frozenset({_MASK} | layer_names(("project_in", "project_out")))


def _places(arrays: Mapping[str, ForeignArray]) -> set[str]:
    # Many modules have an array named mask: it counts only if nothing but projections is beside it.
    return {
        place
        for place in places_of(arrays, _MASK)
        if _is_mask(arrays[f"{place}{_MASK}"])
        and all(name.removeprefix(place) in _NAMES for name in arrays if name.startswith(place))
    }


def _is_mask(array: ForeignArray) -> bool:
    return array.dtype == "int64" and len(array.shape) == 1 and 2 <= array.shape[0] <= MAX_BITS


def _read(checkpoint: Checkpoint, options: Options) -> Reading:
    """Return the quantizer that options and checkpoint describe.

    Raises:
        ForeignCheckpointError: the number of bits is not known, or the checkpoint contradicts the options.
    """
    masks = [place for place in places_of(checkpoint.names(), _MASK) if _is_mask(checkpoint.names()[f"{place}{_MASK}"])]
    bits, order = _read_mask(checkpoint.at(masks[0])) if len(masks) == 1 else (None, None)
    for flag, given, found in (("bits", options.bits, bits), ("bit-order", options.bit_order, order)):
        if given is not None and found is not None and given != found:
            raise checkpoint.error(f"its mask has {flag} {found}, not --{flag} {given}")
    bits = bits if options.bits is None else options.bits
    if bits is None:
        raise ForeignCheckpointError(
            "--kind lfq needs --bits, for example --bits 18: they are in the model's configuration, not in a checkpoint"
        )
    order = options.bit_order or order
    if order is None:
        order = "big"
        checkpoint.note(
            "the bit order is big by default: the first channel is the most significant bit (vector-quantize-pytorch); "
            "for Open-MAGVIT2 pass --bit-order little"
        )
    if not options.spherical:
        checkpoint.note("codes are -1 and 1; --spherical makes them of length one (binary spherical quantization)")
    arguments = {"bits": bits, "bit_order": order, "spherical": options.spherical}
    sizes, tensors = projections_to(checkpoint, bits)
    return Reading("lookup-free quantization", "lfq", {**arguments, **sizes}, tensors)


def _read_mask(checkpoint: Checkpoint) -> tuple[int | None, BitOrder | None]:
    values = checkpoint.integers(_MASK, "a mask").tolist()
    powers = [1 << bit for bit in range(len(values))]
    if values == powers:
        return len(values), "little"
    if values == powers[::-1]:
        return len(values), "big"
    raise checkpoint.error(f"{checkpoint.prefix}{_MASK} does not hold powers of two: its bit order is unknown")


FAMILY = Family("lookup-free quantization", _places, _read, kind="lfq")
