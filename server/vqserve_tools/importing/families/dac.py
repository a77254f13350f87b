"""DAC and codecs with its stages: each projects the residual to a narrow space and the stored row back.

Original files of DAC have weight norm, files of transformers have plain weights (Kumar et al. 2023, arXiv:2306.06546).
MOSS-Audio-Tokenizer has projections around all stages; RepCodec (MaskGCT, IndexTTS 2) and the other codecs of Amphion
have other names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from vqserve_server.quantizers.declared import Metric
from vqserve_tools.importing.families.checkpoint import (
    LAYER_NAMES,
    Checkpoint,
    has_layer,
    layer_names,
    numbered,
    read_layer,
    read_pair,
)
from vqserve_tools.importing.families.family import Family, Reading
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.families.tables import Chain, Stage, residual
from vqserve_tools.importing.files import ForeignArray

_ANCHOR = re.compile(r"((?:.*\.)?)quantizers\.(\d+)\.codebook\.weight")
# The names of a stage's projections: DAC's, then Amphion's.
_DAC = ("in_proj", "out_proj")
_AMPHION = ("in_project", "out_project")
# Projections before the first stage and after the sum of all stages.
OUTER = ("input_proj", "output_proj")
# fish-speech has two such quantizers, of which the second one quantizes the residual of the first.
_FISH = ("semantic_quantizer.", "quantizer.")
_FISH_AROUND = ("downsample.", "pre_module.", "post_module.", "upsample.", "semantic_predictor_module.")
_METRICS: tuple[Metric, ...] = ("l2", "cosine")


def _places_with(arrays: Mapping[str, ForeignArray], names: tuple[str, str]) -> set[str]:
    found = filter(None, map(_ANCHOR.fullmatch, arrays))
    projected = {(match[1], f"{match[1]}quantizers.{match[2]}.{names[0]}.") for match in found}
    return {place for place, layer in projected if any(f"{layer}{name}" in arrays for name in LAYER_NAMES)}


def _stages(checkpoint: Checkpoint, names: tuple[str, str]) -> list[Stage]:
    views = numbered(checkpoint, "quantizers", checkpoint.names())
    stage_names = {"codebook.weight", *layer_names(names)}
    known = {f"quantizers.{number}.{name}" for number in range(len(views)) for name in stage_names}
    checkpoint.check_known(known, modules=["quantizers"])
    return [
        Stage(
            view.floats("codebook.weight", rank=2, what="a codebook is (K, D)"),
            *(read_layer(view, name, biased=True) for name in names),
        )
        for view in views
    ]


def _places(arrays: Mapping[str, ForeignArray]) -> set[str]:
    return _places_with(arrays, _DAC) - {f"{pair}{part}" for pair in _fish_places(arrays) for part in _FISH}


def _read(checkpoint: Checkpoint, options: Options) -> Reading:
    if any(has_layer(checkpoint, name) for name in OUTER):
        metric = options.asked_metric(
            checkpoint,
            "MOSS-Audio-Tokenizer's quantizer",
            "quantizer_type rlfq in its config.json is cosine, rvq and spec_rvq are l2, with the same keys",
            _METRICS,
        )
        options.decode_of("MOSS-Audio-Tokenizer", metric, "raw")
        chain = Chain(_stages(checkpoint, _DAC), *read_pair(checkpoint, OUTER, biased=True))
        return residual(checkpoint, "MOSS-Audio-Tokenizer", [chain], metric)
    metric = options.metric_of("DAC", "cosine")
    options.decode_of("DAC", metric, "raw")
    if "quantizers.0.in_proj.parametrizations.weight.original0" in checkpoint:
        # No DAC file, original or of transformers, has weight norm under these names.
        checkpoint.note(
            "SNAC has these keys too, but its stages have different rates: if this is SNAC, the codebook gives wrong "
            "tokens"
        )
    return residual(checkpoint, "DAC", [Chain(_stages(checkpoint, _DAC))], metric)


def _amphion_places(arrays: Mapping[str, ForeignArray]) -> set[str]:
    return _places_with(arrays, _AMPHION)


def _read_amphion(checkpoint: Checkpoint, options: Options) -> Reading:
    metric = options.metric or "cosine"
    if metric not in _METRICS:
        raise checkpoint.error(f"RepCodec is not searched by {metric}: leave out --metric, or pass --metric l2")
    options.decode_of("RepCodec", metric, "raw")
    if options.metric is None:
        checkpoint.note(
            "RepCodec's published models are searched by cosine; --metric l2 for one that was trained with "
            "use_l2_normlize=False"
        )
    return residual(checkpoint, "RepCodec", [Chain(_stages(checkpoint, _AMPHION))], metric)


def _fish_places(arrays: Mapping[str, ForeignArray]) -> set[str]:
    semantic, acoustic = _FISH
    found = _places_with(arrays, _DAC)
    pairs = {place.removesuffix(semantic) for place in found if place.endswith(semantic)}
    return {place for place in pairs if f"{place}{acoustic}" in found}


def _read_fish(checkpoint: Checkpoint, options: Options) -> Reading:
    metric = options.metric_of("fish-speech", "cosine")
    options.decode_of("fish-speech", metric, "raw")
    stages = [stage for part in _FISH for stage in _stages(checkpoint.at(part), _DAC)]
    # Before and after the codes; they change the rate.
    around = {name for name in checkpoint.names() if name.startswith(_FISH_AROUND)}
    checkpoint.check_known(around, modules=[module.removesuffix(".") for module in _FISH_AROUND])
    return residual(checkpoint, "fish-speech", [Chain(stages)], metric)


FAMILY = Family("DAC (or MOSS-Audio-Tokenizer)", _places, _read)
AMPHION = Family("RepCodec", _amphion_places, _read_amphion)
FISH = Family("fish-speech", _fish_places, _read_fish)
