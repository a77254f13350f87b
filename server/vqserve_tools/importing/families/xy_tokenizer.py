"""XY-Tokenizer of MOSS-TTSD: stages that search by distance, between two projections; a codebook is a buffer."""

from __future__ import annotations

import re
from collections.abc import Mapping

from vqserve_tools.importing.families.checkpoint import Checkpoint, layer_names, numbered, read_pair
from vqserve_tools.importing.families.family import Family, Reading
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.families.tables import Chain, Stage, residual
from vqserve_tools.importing.files import ForeignArray

_ANCHOR = re.compile(r"((?:.*\.)?)quantizers\.\d+\.codebook")
_BUFFERS = ("codebook", "inited", "cluster_size", "embed_avg")
_LAYERS = ("in_project", "out_project")
_OUTER = ("input_proj", "output_proj")


def _places(arrays: Mapping[str, ForeignArray]) -> set[str]:
    found = filter(None, map(_ANCHOR.fullmatch, arrays))
    return {match[1] for match in found if f"{match[0].removesuffix('codebook')}embed_avg" in arrays}


def _read(checkpoint: Checkpoint, options: Options) -> Reading:
    metric = options.metric_of("XY-Tokenizer", "l2")
    options.decode_of("XY-Tokenizer", metric, "raw")
    views = numbered(checkpoint, "quantizers", checkpoint.names())
    stage_names = {*_BUFFERS, *layer_names(_LAYERS)}
    known = {f"quantizers.{number}.{name}" for number in range(len(views)) for name in stage_names}
    checkpoint.check_known(known, modules=["quantizers"])
    stages = [
        Stage(view.floats("codebook", rank=2, what="a codebook is (K, D)"), *read_pair(view, _LAYERS, biased=True))
        for view in views
    ]
    return residual(checkpoint, "XY-Tokenizer", [Chain(stages, *read_pair(checkpoint, _OUTER, biased=True))], metric)


FAMILY = Family("XY-Tokenizer", _places, _read)
