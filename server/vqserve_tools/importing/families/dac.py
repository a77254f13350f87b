"""DAC: every stage projects the residual to a narrow space, searches by cosine and projects the stored row back.

Original files have weight norm, files of transformers have plain weights (Kumar et al. 2023, arXiv:2306.06546).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from vqserve_tools.importing.families.checkpoint import LAYER_NAMES, Checkpoint, layer_names, numbered, read_layer
from vqserve_tools.importing.families.family import Family, Reading
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.families.tables import Chain, Stage, residual
from vqserve_tools.importing.files import ForeignArray

_ANCHOR = re.compile(r"((?:.*\.)?)quantizers\.(\d+)\.codebook\.weight")
_LAYERS = ("in_proj", "out_proj")


def _places(arrays: Mapping[str, ForeignArray]) -> set[str]:
    found = filter(None, map(_ANCHOR.fullmatch, arrays))
    projected = {(match[1], f"{match[1]}quantizers.{match[2]}.in_proj.") for match in found}
    return {place for place, layer in projected if any(f"{layer}{name}" in arrays for name in LAYER_NAMES)}


def _read(checkpoint: Checkpoint, options: Options) -> Reading:
    metric = options.metric_of("DAC", "cosine")
    decode_normalized = options.decode_of("DAC", metric, "raw")
    views = numbered(checkpoint, "quantizers", checkpoint.names())
    stage_names = {"codebook.weight", *layer_names(_LAYERS)}
    known = {f"quantizers.{number}.{name}" for number in range(len(views)) for name in stage_names}
    checkpoint.check_known(known, modules=["quantizers"])
    if "quantizers.0.in_proj.parametrizations.weight.original0" in checkpoint:
        # No DAC file, original or of transformers, has weight norm under these names.
        checkpoint.note(
            "SNAC has these keys too, but its stages have different rates: if this is SNAC, the codebook gives wrong "
            "tokens"
        )
    stages = [
        Stage(
            view.floats("codebook.weight", rank=2, what="a codebook is (K, D)"),
            *(read_layer(view, name, biased=True) for name in _LAYERS),
        )
        for view in views
    ]
    return residual(checkpoint, "DAC", [Chain(stages)], metric, decode_normalized=decode_normalized)


FAMILY = Family("DAC", _places, _read)
