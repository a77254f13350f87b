"""Binary spherical quantization as in bsq-vit: signs; two buffers of powers of two identify it.

Codes have length one (Zhao et al. 2024, arXiv:2406.07548).
"""

from __future__ import annotations

from collections.abc import Mapping

from vqserve_server.quantizers.scalar import MAX_BITS
from vqserve_tools.importing.families.checkpoint import Checkpoint, places_of
from vqserve_tools.importing.families.family import Family, Reading
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.files import ForeignArray

_BASIS, _GROUP_BASIS = "basis", "group_basis"
_NAME = "binary spherical quantization"


def _places(arrays: Mapping[str, ForeignArray]) -> set[str]:
    return {place for place in places_of(arrays, _GROUP_BASIS) if f"{place}{_BASIS}" in arrays}


def _read(checkpoint: Checkpoint, options: Options) -> Reading:
    checkpoint.check_known([_BASIS, _GROUP_BASIS])
    [bits, *rest], group = checkpoint.shape(_BASIS) or (0,), checkpoint.shape(_GROUP_BASIS)
    if rest or bits < 1 or len(group) != 1:
        raise checkpoint.error(f"{checkpoint.prefix}{_BASIS} and {_GROUP_BASIS} do not hold a power of two for a bit")
    if bits > MAX_BITS:
        raise checkpoint.error(
            f"its tokens have {bits} bits, and an index has at most {MAX_BITS}: it would need an index for each group "
            f"of {group[0]} bits, which is not supported"
        )
    values = checkpoint.integers(_BASIS, "a basis").tolist()
    checkpoint.integers(_GROUP_BASIS, "a basis")
    if values != [1 << bit for bit in reversed(range(bits))]:
        raise checkpoint.error(f"{checkpoint.prefix}{_BASIS} does not hold descending powers of two")
    for flag, given, found in (("bits", options.bits, bits), ("bit-order", options.bit_order, "big")):
        if given not in (None, found):
            raise checkpoint.error(f"its basis has {flag} {found}, not --{flag} {given}")
    checkpoint.note(
        f"codes have length one; for a model with post_q_l2_norm=False, codes are -1 and 1: --kind lfq --bits {bits}"
    )
    arguments = {"bits": bits, "bit_order": "big", "spherical": True, "input_dim": None, "output_dim": None}
    return Reading(_NAME, "lfq", arguments, {})


FAMILY = Family(_NAME, _places, _read)
