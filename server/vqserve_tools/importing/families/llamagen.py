"""LlamaGen, and models with its quantizer: MaskGIT-pytorch, Janus. A buffer that counts used codes identifies them.

The published models search by cosine and decode to normalised rows. A flag of the constructor can change this, and no
file contains it (Sun et al. 2024, arXiv:2406.06525).
"""

from __future__ import annotations

from collections.abc import Mapping

from vqserve_server.quantizers.declared import WEIGHT
from vqserve_tools.importing.families.checkpoint import Checkpoint, places_of
from vqserve_tools.importing.families.family import Family, Reading
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.families.tables import Stage, single
from vqserve_tools.importing.files import ForeignArray

_USAGE = "codebook_used"


def _places(arrays: Mapping[str, ForeignArray]) -> set[str]:
    return {place for place in places_of(arrays, _USAGE) if f"{place}{WEIGHT}" in arrays}


def _read(checkpoint: Checkpoint, options: Options) -> Reading:
    checkpoint.check_known([WEIGHT, _USAGE])
    metric = options.metric or "cosine"
    decode_normalized = options.decode_of("LlamaGen", metric, "normalized")
    if options.metric is None:
        checkpoint.note(
            f"{_USAGE} is LlamaGen's: searched by cosine, decoded to rows of length one, as its published models are; "
            "--metric l2 for one that was trained without l2 norm"
        )
    codes = checkpoint.floats(WEIGHT, rank=2, what="the codebook must be (K, D)")
    return single("LlamaGen", Stage(codes), metric, decode_normalized=decode_normalized)


FAMILY = Family("LlamaGen", _places, _read)
