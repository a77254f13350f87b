"""SimVQ: the codes are a learnt linear map of fixed random codes.

It searches by distance (Zhu et al. 2024, arXiv:2411.02038). The names are those of vector-quantize-pytorch, whose
ResidualSimVQ is a chain of such stages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from vqserve_server.search.rounding import affine
from vqserve_tools.importing.families.checkpoint import Checkpoint, Floats, layer_names, numbered, read_layer
from vqserve_tools.importing.families.family import Family, Reading
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.families.tables import Chain, Stage, residual, single
from vqserve_tools.importing.files import ForeignArray

_ANCHOR = re.compile(r"((?:.*?\.)??)(?:layers\.\d+\.)?frozen_codebook")
_NAMES = frozenset({"frozen_codebook"} | layer_names(["code_transform"]))


def _places(arrays: Mapping[str, ForeignArray]) -> set[str]:
    return {match[1] for match in map(_ANCHOR.fullmatch, arrays) if match}


def _read(checkpoint: Checkpoint, options: Options) -> Reading:
    metric = options.metric_of("SimVQ", "l2")
    options.decode_of("SimVQ", metric, "raw")
    views = numbered(checkpoint, "layers", checkpoint.names())
    known = {*_NAMES, *(f"layers.{number}.{name}" for number in range(len(views)) for name in _NAMES)}
    checkpoint.check_known(known, modules=["frozen_codebook", "code_transform", "layers"])
    if "frozen_codebook" in checkpoint:
        return single("SimVQ", Stage(_codes(checkpoint)), metric)
    return residual(checkpoint, "ResidualSimVQ", [Chain([Stage(_codes(view)) for view in views])], metric)


def _codes(checkpoint: Checkpoint) -> Floats:
    """Return the transformed codes, each element the exact value rounded once to float32."""
    frozen = checkpoint.floats("frozen_codebook", rank=2, what="a codebook is (K, D)")
    transform = read_layer(checkpoint, "code_transform")
    if transform.inputs != frozen.shape[1]:
        raise checkpoint.error(f"{checkpoint.prefix}code_transform does not take rows of the frozen codebook")
    codes = affine(*map(torch.from_numpy, (frozen, transform.weight, transform.bias)))
    if not bool(torch.isfinite(codes).all()):
        raise checkpoint.error(f"{checkpoint.prefix}code_transform makes codes beyond float32's range")
    return codes.numpy()


FAMILY = Family("SimVQ", _places, _read)
