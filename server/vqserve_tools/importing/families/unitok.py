"""UniTok: product quantization. Each of the codebooks quantizes its part of the channels by cosine.

It decodes to rows of length one (Ma et al. 2025, arXiv:2502.20321).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from vqserve_tools.importing.families.checkpoint import Checkpoint, numbered
from vqserve_tools.importing.families.family import Family, Reading
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.families.tables import Chain, Stage, residual
from vqserve_tools.importing.files import ForeignArray

_ANCHOR = re.compile(r"((?:.*\.)?)codebooks\.\d+\.vocab_usage")
_CODES, _USAGE = "codebook.weight", "vocab_usage"


def _places(arrays: Mapping[str, ForeignArray]) -> set[str]:
    found = filter(None, map(_ANCHOR.fullmatch, arrays))
    return {match[1] for match in found if f"{match[0].removesuffix(_USAGE)}{_CODES}" in arrays}


def _read(checkpoint: Checkpoint, options: Options) -> Reading:
    metric = options.metric_of("UniTok", "cosine")
    decode_normalized = options.decode_of("UniTok", metric, "normalized")
    views = numbered(checkpoint, "codebooks", checkpoint.names())
    known = {f"codebooks.{number}.{name}" for number in range(len(views)) for name in (_CODES, _USAGE)}
    checkpoint.check_known(known, modules=["codebooks"])
    chains = [Chain([Stage(view.floats(_CODES, rank=2, what="a codebook is (K, D)"))]) for view in views]
    return residual(checkpoint, "UniTok", chains, metric, decode_normalized=decode_normalized, are_groups=True)


FAMILY = Family("UniTok", _places, _read)
