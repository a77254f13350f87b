"""The speech tokenizer of GLM-4-Voice, which Kimi-Audio uses too: a codebook in the middle of a Whisper encoder.

It is searched by distance. A second table of positions, added after the codes, identifies it.
"""

from __future__ import annotations

from collections.abc import Mapping

from vqserve_tools.importing.families.checkpoint import Checkpoint, places_of
from vqserve_tools.importing.families.family import Family, Reading
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.families.tables import Stage, single
from vqserve_tools.importing.files import ForeignArray

_CODES, _POSITIONS = "codebook.weight", "embed_positions2.weight"
_NAME = "WhisperVQ"


def _places(arrays: Mapping[str, ForeignArray]) -> set[str]:
    return {place for place in places_of(arrays, _CODES) if f"{place}{_POSITIONS}" in arrays}


def _read(checkpoint: Checkpoint, options: Options) -> Reading:
    metric = options.metric_of(_NAME, "l2")
    options.decode_of(_NAME, metric, "raw")
    checkpoint.check_known([_CODES], modules=["codebook"])
    checkpoint.note(f"{checkpoint.prefix}{_POSITIONS}, which the model adds to the codes, was left")
    return single(_NAME, Stage(checkpoint.floats(_CODES, rank=2, what="the codebook must be (K, D)")), metric)


FAMILY = Family("WhisperVQ (GLM-4-Voice, Kimi-Audio)", _places, _read, in_model=True)
