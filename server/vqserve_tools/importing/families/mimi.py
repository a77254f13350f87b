"""Mimi: a semantic and an acoustic residual quantizer of the same input, in files of moshi and of transformers.

The file has no codes; it has running averages, and the codes are their quotients (Defossez et al. 2024,
arXiv:2410.00037).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vqserve_tools.importing.families.checkpoint import Checkpoint, Floats, layer_names, numbered, places_of, read_pair
from vqserve_tools.importing.families.family import Family, Reading
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.families.tables import Chain, Stage, residual
from vqserve_tools.importing.files import ForeignArray

# The two parts, and the names of their stages and codebooks: in moshi, then in transformers.
_MODULES = (
    (("rvq_first", "rvq_rest"), "vq.layers", "_codebook"),
    (
        ("semantic_residual_vector_quantizer", "acoustic_residual_vector_quantizer"),
        "layers",
        "codebook",
    ),
)
_SUMS = ("embedding_sum", "embed_sum")
_AVERAGES = (*_SUMS, "cluster_usage", "_initialized", "initialized")
# float32, because both libraries compare in float32.
_LEAST_USAGE = np.float32(1e-5)


def _anchors(first: str, layers: str, codebook: str) -> list[str]:
    return [f"{first}.{layers}.0.{codebook}.{name}" for name in _SUMS]


def _places(arrays: Mapping[str, ForeignArray]) -> set[str]:
    return {
        place
        for (first, _), layers, codebook in _MODULES
        for anchor in _anchors(first, layers, codebook)
        for place in places_of(arrays, anchor)
    }


def _read(checkpoint: Checkpoint, options: Options) -> Reading:
    metric = options.metric_of("Mimi", "l2")
    options.decode_of("Mimi", metric, "raw")
    parts, layers, codebook = next(
        modules
        for modules in _MODULES
        if any(name in checkpoint for name in _anchors(modules[0][0], modules[1], modules[2]))
    )
    names = checkpoint.names()
    chains, known = [], set[str]()
    for part in parts:
        view = checkpoint.at(f"{part}.")
        views = numbered(view, layers, view.names())
        if not views:
            raise checkpoint.error(f"{checkpoint.prefix}{part} has no stages: Mimi's quantizer has two parts")
        known |= {f"{part}.{name}" for name in layer_names(("input_proj", "output_proj"))}
        known |= {f"{part}.{layers}.{i}.{codebook}.{name}" for i in range(len(views)) for name in _AVERAGES}
        stages = [Stage(_codes(stage.at(f"{codebook}."))) for stage in views]
        chains.append(Chain(stages, *read_pair(view, ("input_proj", "output_proj"))))
    checkpoint.check_known(known, modules={name.partition(".")[0] for name in names if name.startswith(parts)})
    return residual(checkpoint, "Mimi", chains, metric)


def _codes(checkpoint: Checkpoint) -> Floats:
    """Return sums / max(usage, 1e-5) in float32, as the libraries compute it."""
    sums_name = next((name for name in _SUMS if name in checkpoint), _SUMS[0])
    sums = checkpoint.floats(sums_name, rank=2, what="it should be (K, D)")
    usage = checkpoint.floats("cluster_usage", rank=1, what="it should be (K,)")
    if len(usage) != len(sums):
        raise checkpoint.error(f"{checkpoint.prefix}{sums_name} and cluster_usage do not fit together")
    with np.errstate(over="ignore"):
        codes: Floats = np.divide(sums, np.maximum(usage, _LEAST_USAGE)[:, None], dtype=np.float32)
    if not np.isfinite(codes).all():
        raise checkpoint.error(f"{checkpoint.prefix}{sums_name} / cluster_usage exceeds float32's range")
    return codes


FAMILY = Family("Mimi", _places, _read)
