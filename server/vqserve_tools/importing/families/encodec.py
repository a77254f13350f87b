"""EnCodec, and models with its keys: SpeechTokenizer, WavTokenizer, XCodec, Higgs Audio v2.

Both in original files and in files of transformers. A residual quantizer that searches by distance (Defossez et al.
2022, arXiv:2210.13438). A stage of Higgs Audio v2 has projections of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from vqserve_tools.importing.families.checkpoint import Checkpoint, layer_names, numbered, read_pair
from vqserve_tools.importing.families.family import Family, Reading
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.families.tables import Chain, Stage, residual
from vqserve_tools.importing.files import ForeignArray

# The codebook of a stage is named _codebook in original files, codebook in files of transformers; the list of stages is
# named quantizers by XCodec and Higgs Audio.
_ANCHOR = re.compile(r"((?:.*\.)?)(?:layers|quantizers)\.\d+\.(_codebook|codebook)\.embed")
_BUFFERS = ("inited", "cluster_size", "embed", "embed_avg")
_LAYERS = ("project_in", "project_out")


def _places(arrays: Mapping[str, ForeignArray]) -> set[str]:
    found = ((match, arrays[name]) for name in arrays if (match := _ANCHOR.fullmatch(name)))
    # Older files of vector-quantize-pytorch also have two axes; they have `initted` instead of `inited`.
    return {
        match[1]
        for match, array in found
        if len(array.shape) == 2 and f"{match[0].removesuffix('embed')}initted" not in arrays
    }


def _read(checkpoint: Checkpoint, options: Options) -> Reading:
    names = checkpoint.names()
    stages_name = "quantizers" if any(name.startswith("quantizers.") for name in names) else "layers"
    family = "EnCodec" if stages_name == "layers" else "XCodec"
    metric = options.metric_of(family, "l2")
    options.decode_of(family, metric, "raw")
    views = numbered(checkpoint, stages_name, names)
    codebook = "_codebook" if "_codebook.embed" in views[0] else "codebook"
    stage_names = {f"{codebook}.{name}" for name in _BUFFERS} | layer_names(_LAYERS)
    known = {f"{stages_name}.{number}.{name}" for number in range(len(views)) for name in stage_names}
    checkpoint.check_known(known, modules=[stages_name])
    stages = [
        Stage(
            view.floats(f"{codebook}.embed", rank=2, what="a codebook is (K, D)"),
            *read_pair(view, _LAYERS, biased=True),
        )
        for view in views
    ]
    if family == "XCodec" and stages[0].proj_in is not None:
        family = "Higgs Audio v2"
    return residual(checkpoint, family, [Chain(stages)], metric)


FAMILY = Family("EnCodec (or SpeechTokenizer, WavTokenizer, XCodec, Higgs Audio v2)", _places, _read)
