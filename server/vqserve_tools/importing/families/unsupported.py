"""Quantizers that are recognised in order to be refused: an inner part of each looks like a family that is imported."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import NoReturn

from vqserve_server.quantizers.declared import WEIGHT
from vqserve_tools.importing.families.checkpoint import Checkpoint, places_of
from vqserve_tools.importing.families.family import Family
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.files import ForeignArray

# Usage per scale, and convolutions after the codes of a scale.
_SCALES = re.compile(r"((?:.*\.)?)(?:ema_vocab_hit_SV|quant_resi\..*)")
_ONE_SCALE = ("quantizer.lfq.mask", "quantize.lfq.mask")
_STAGES = re.compile(r"((?:.*\.)?)layers\.\d+\.mask")


def _multi_scale_places(arrays: Mapping[str, ForeignArray]) -> set[str]:
    found = {match[1] for match in map(_SCALES.fullmatch, arrays) if match}
    bits = {f"{place}{mask.removesuffix('mask')}" for mask in _ONE_SCALE for place in places_of(arrays, mask)}
    return {place for place in found if f"{place}{WEIGHT}" in arrays} | bits


def _read_multi_scale(checkpoint: Checkpoint, _: Options) -> NoReturn:
    one_scale = "; if this one has a single scale, pass --kind lfq --bits" if "mask" in checkpoint else ""
    raise checkpoint.error(
        f"{_module(checkpoint)} is a quantizer of several scales (as VAR's and Infinity's), which needs all tokens of "
        f"an image at once; vqserve quantizes every token alone, and does not support it{one_scale}"
    )


def _residual_lfq_places(arrays: Mapping[str, ForeignArray]) -> set[str]:
    stages = Counter(match[1] for match in map(_STAGES.fullmatch, arrays) if match)
    return {place for place, count in stages.items() if count > 1}


def _read_residual_lfq(checkpoint: Checkpoint, _: Options) -> NoReturn:
    raise checkpoint.error(
        f"{_module(checkpoint)} is residual lookup-free quantization, which is not supported: it would need a residual "
        "quantizer whose stages are signs"
    )


def _module(checkpoint: Checkpoint) -> str:
    return checkpoint.prefix.removesuffix(".") or "it"


MULTI_SCALE = Family("several scales, not supported", _multi_scale_places, _read_multi_scale)
RESIDUAL_LFQ = Family("residual lookup-free quantization, not supported", _residual_lfq_places, _read_residual_lfq)
