"""The speech tokenizers of CosyVoice 2 and 3 (S3Tokenizer v2, v3): a projection, and three values for each channel.

Their library decodes nothing, so that there is no projection behind the codes (Du et al. 2024, arXiv:2412.10117).
"""

from __future__ import annotations

from collections.abc import Mapping

from vqserve_tools.importing.families.checkpoint import Checkpoint, layer_names, places_of, read_layer
from vqserve_tools.importing.families.family import Family, Reading
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.files import ForeignArray

_LAYER = "project_down"
_NAME = "S3Tokenizer"
_LEVELS = 3


def _places(arrays: Mapping[str, ForeignArray]) -> set[str]:
    return {
        place for place in places_of(arrays, f"_codebook.{_LAYER}.weight") if len(arrays[_weight(place)].shape) == 2
    }


def _weight(place: str) -> str:
    return f"{place}_codebook.{_LAYER}.weight"


def _read(checkpoint: Checkpoint, options: Options) -> Reading:
    codebook = checkpoint.at("_codebook.")
    codebook.check_known(layer_names([_LAYER]))
    layer = read_layer(codebook, _LAYER, biased=True)
    levels = (_LEVELS,) * layer.outputs
    for flag, given, found in (("levels", options.levels, levels), ("bound", options.bound, "tan")):
        if given not in (None, found):
            raise checkpoint.error(f"{_NAME} has {flag} {_text(found)}, not --{flag} {_text(given)}: leave it out")
    checkpoint.note(f"codes decode to {layer.outputs} values of -1, 0 and 1: the model has no projection behind them")
    return Reading(
        _NAME,
        "fsq",
        {"levels": list(levels), "bound": "tan", "input_dim": layer.inputs, "output_dim": None},
        {"proj_in.weight": layer.weight, "proj_in.bias": layer.bias},
    )


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


FAMILY = Family("S3Tokenizer (CosyVoice 2 and 3)", _places, _read)
