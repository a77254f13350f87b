"""RQ-VAE of recommenders, for semantic ids: LC-Rec, MiniOneRec and others with their names of stages.

A residual quantizer that searches by distance (Rajput et al. 2023, arXiv:2305.05065). In training the last stages take
other codes than the nearest to spread items (Sinkhorn); ids are made with `use_sk=False`, which takes the nearest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from vqserve_tools.importing.families.checkpoint import Checkpoint, numbered
from vqserve_tools.importing.families.family import Family, Reading
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.families.tables import Chain, Stage, residual
from vqserve_tools.importing.files import ForeignArray

_ANCHOR = re.compile(r"((?:.*\.)?)vq_layers\.\d+\.embedding\.weight")
_CODES = "embedding.weight"
_NAME = "RQ-VAE"


def _places(arrays: Mapping[str, ForeignArray]) -> set[str]:
    return {match[1] for match in map(_ANCHOR.fullmatch, arrays) if match}


def _read(checkpoint: Checkpoint, options: Options) -> Reading:
    metric = options.metric or "l2"
    decode_normalized = options.asked_decode(checkpoint, "a codebook with these keys", metric)
    if options.metric is None:
        checkpoint.note(
            "LC-Rec and MiniOneRec search these keys by distance; --metric for a model that searches otherwise"
        )
    views = numbered(checkpoint, "vq_layers", checkpoint.names())
    checkpoint.check_known({f"vq_layers.{number}.{_CODES}" for number in range(len(views))}, modules=["vq_layers"])
    stages = [Stage(view.floats(_CODES, rank=2, what="a codebook is (K, D)")) for view in views]
    return residual(
        checkpoint,
        _NAME,
        [Chain(stages)],
        metric,
        decode_normalized=decode_normalized,
        normalize_residuals=options.normalize_residuals,
    )


FAMILY = Family("RQ-VAE (LC-Rec, MiniOneRec)", _places, _read)
