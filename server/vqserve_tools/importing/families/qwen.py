"""The 25 Hz tokenizer of Qwen3-TTS: all stages of a group in one array, searched by distance."""

from __future__ import annotations

import re
from collections.abc import Mapping

from vqserve_tools.importing.families.checkpoint import Checkpoint, layer_names, numbered, read_pair
from vqserve_tools.importing.families.family import Family, Reading
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.families.tables import Chain, Stage, residual, single
from vqserve_tools.importing.files import ForeignArray

_ANCHOR = re.compile(r"((?:.*?\.)??)rvqs\.\d+\.embed")
_BUFFERS = ("inited", "cluster_size", "embed", "embed_avg")
_LAYERS = ("project_in", "project_out")
_NAME = "Qwen 25 Hz"


def _places(arrays: Mapping[str, ForeignArray]) -> set[str]:
    found = ((match, arrays[name]) for name in arrays if (match := _ANCHOR.fullmatch(name)))
    return {match[1] for match, array in found if len(array.shape) == 3}


def _read(checkpoint: Checkpoint, options: Options) -> Reading:
    metric = options.metric_of(_NAME, "l2")
    options.decode_of(_NAME, metric, "raw")
    groups = numbered(checkpoint, "rvqs", checkpoint.names())
    if len(groups) > 1:
        raise checkpoint.error(
            f"it has {len(groups)} groups, and its library divides an axis into groups that is time for one of its "
            "callers: which one the model means is not in the file; name the arrays of the stages with --key"
        )
    [group] = groups
    embed = group.floats("embed", rank=3, what="the codebooks of all stages are (n_q, K, D)")
    names = {*_BUFFERS, *(f"layers.{i}.{name}" for i in range(len(embed)) for name in layer_names(_LAYERS))}
    checkpoint.check_known({f"rvqs.0.{name}" for name in names}, modules=["rvqs"])
    if not len(embed):
        raise checkpoint.error(f"{group.prefix}embed has no stages")
    stages = [Stage(codes, *read_pair(group.at(f"layers.{i}."), _LAYERS, biased=True)) for i, codes in enumerate(embed)]
    if len(stages) == 1:
        # The library's indices have no axis of stages either.
        return single(_NAME, stages[0], metric)
    return residual(checkpoint, _NAME, [Chain(stages)], metric)


FAMILY = Family(_NAME, _places, _read)
