"""vector-quantize-pytorch by lucidrains: VectorQuantize, ResidualVQ, GroupedResidualVQ.

Cosine codebooks and distance codebooks have the same keys, so the metric must be given. Both decode to stored rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from vqserve_server.quantizers.declared import Metric
from vqserve_tools.importing.families.checkpoint import (
    Checkpoint,
    Floats,
    Layer,
    has_layer,
    layer_names,
    numbered,
    read_pair,
    shape_text,
)
from vqserve_tools.importing.families.family import Family, Reading
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.families.tables import Chain, Stage, residual, single
from vqserve_tools.importing.files import ForeignArray

_NAME = "vector-quantize-pytorch"
_ANCHOR = re.compile(r"((?:.*?\.)??)((?:rvqs\.\d+\.)?(?:layers\.\d+\.)?_codebook\.)embed")
_BUFFERS = tuple(f"_codebook.{name}" for name in ("initted", "cluster_size", "embed_avg", "embed"))
_LAYERS = ("project_in", "project_out")
_MODULES = ("_codebook", "layers", "rvqs", "mlps", *_LAYERS)
_METRICS: tuple[Metric, ...] = ("l2", "cosine")


def _places(arrays: Mapping[str, ForeignArray]) -> set[str]:
    found = ((match, arrays[name]) for name in arrays if (match := _ANCHOR.fullmatch(name)))
    return {
        match[1]
        for match, array in found
        if len(array.shape) == 3 or (len(array.shape) == 2 and f"{match[1]}{match[2]}initted" in arrays)
    }


def _read(checkpoint: Checkpoint, options: Options) -> Reading:
    metric = options.asked_metric(
        checkpoint, f"a codebook of {_NAME}", "codebooks for distance and for cosine have the same keys", _METRICS
    )
    options.decode_of(_NAME, metric, "raw")
    groups = numbered(checkpoint, "rvqs", checkpoint.names())
    _check_names(checkpoint, groups)
    if groups:
        chains = [_chain(group) for group in groups]
        return residual(checkpoint, f"{_NAME} GroupedResidualVQ", chains, metric, are_groups=True)
    if numbered(checkpoint, "layers", checkpoint.names()):
        return residual(checkpoint, f"{_NAME} ResidualVQ", [_chain(checkpoint)], metric)
    return _vector_quantize(checkpoint, metric)


def _vector_quantize(checkpoint: Checkpoint, metric: Metric) -> Reading:
    heads = _heads(checkpoint)
    family = f"{_NAME} VectorQuantize"
    if len(heads) == 1:
        layers = read_pair(checkpoint, _LAYERS, biased=True)
        _check_width(checkpoint, heads[0], layers[0])
        return single(family, Stage(heads[0], *layers), metric)
    if has_layer(checkpoint, "project_in"):
        raise checkpoint.error(f"its {len(heads)} heads share one projection, which is not supported")
    # Heads with own codebooks divide the channels like groups.
    return residual(checkpoint, family, [Chain([Stage(codes)]) for codes in heads], metric, are_groups=True)


def _chain(checkpoint: Checkpoint) -> Chain:
    stages = []
    for view in numbered(checkpoint, "layers", checkpoint.names()):
        heads = _heads(view)
        if len(heads) > 1:
            raise checkpoint.error(f"{view.prefix}_codebook.embed has {len(heads)} heads: a stage has one")
        stages.append(Stage(heads[0]))
    layers = read_pair(checkpoint, _LAYERS, biased=True)
    _check_width(checkpoint, stages[0].codes, layers[0])
    return Chain(stages, *layers)


def _heads(checkpoint: Checkpoint) -> list[Floats]:
    embed = checkpoint.floats("_codebook.embed")
    if embed.ndim == 2:
        # Older versions had no axis of heads.
        embed = embed[None]
    if embed.ndim != 3 or len(embed) == 0:
        raise checkpoint.error(
            f"{checkpoint.prefix}_codebook.embed has shape {shape_text(embed.shape)}: it should be (heads, K, D)"
        )
    return list(embed)


def _check_width(checkpoint: Checkpoint, codes: Floats, layer: Layer | None) -> None:
    width = codes.shape[1]
    if layer is not None and layer.outputs != width:
        raise checkpoint.error(
            f"{checkpoint.prefix}project_in has {layer.outputs} outputs for codes of width {width}: several heads "
            "that share a codebook are not supported"
        )


def _check_names(checkpoint: Checkpoint, groups: list[Checkpoint]) -> None:
    names = {*_BUFFERS, *layer_names(_LAYERS)}
    at = [""] if not groups else [group.prefix.removeprefix(checkpoint.prefix) for group in groups]
    known = {f"{place}{name}" for place in at for name in names}
    for place in at:
        count = len(numbered(checkpoint.at(place), "layers", checkpoint.at(place).names()))
        known |= {f"{place}layers.{number}.{name}" for number in range(count) for name in _BUFFERS}
    checkpoint.check_known(known, modules=_MODULES)


FAMILY = Family(_NAME, _places, _read)
