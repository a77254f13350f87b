"""Residual finite scalar quantization: ResidualFSQ and GroupedResidualFSQ of vector-quantize-pytorch, and X-Codec 2.

A checkpoint has projections at most. Levels, stages and the version of the library, whose bound and scales changed
twice, are in no file; the model's configuration and its pinned requirements have them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vqserve.errors import ForeignCheckpointError
from vqserve_server.quantizers.residual_scalar import ResidualBound, Scales
from vqserve_tools.importing.families.checkpoint import Checkpoint, Floats, layer_names, numbered, places_of
from vqserve_tools.importing.families.family import Family, Reading
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.families.tables import projections_to
from vqserve_tools.importing.files import ForeignArray

_KIND = "residual_fsq"
_LAYERS = ("project_in", "project_out")
_GROUPS = re.compile(r"((?:.*?\.)?)rvqs\.\d+\.project_in\.")
_NAME = "residual finite scalar quantization"
# The default bound and scales of vector-quantize-pytorch, from a release to below another, as their sources have them.
# There is no release 1.18.4; those after 1.32 may change the formula again.
_VERSIONS: tuple[tuple[tuple[int, ...], tuple[int, ...], ResidualBound, Scales], ...] = (
    ((0,), (1, 18, 4), "atanh_twice", "levels_minus_one"),
    ((1, 18, 5), (1, 26), "atanh", "levels_minus_one"),
    ((1, 26), (1, 33), "soft_clamp", "levels"),
)
_XCODEC = "X-Codec 2 (or NeuCodec)"
_XCODEC_WIDTH = 2048


@dataclass(frozen=True)
class _Formula:
    levels: tuple[int, ...]
    stages: int
    bound: str
    scales: str


# They were trained with version 1.17.8.
_XCODEC_FORMULA = _Formula((4,) * 8, 1, "atanh_twice", "levels_minus_one")


def _read(checkpoint: Checkpoint, options: Options) -> Reading:
    """Return the quantizer of the options, with the projections of the checkpoint if it has any.

    Raises:
        ForeignCheckpointError: an option is missing, or the checkpoint has a layer that is not supported.
    """
    if options.levels is None or options.stages is None:
        raise ForeignCheckpointError(
            f"--kind {_KIND} needs --levels and --stages, for example --levels 8,5,5,5 --stages 4: they are in the "
            "model's configuration, not in a checkpoint"
        )
    formula = _Formula(options.levels, options.stages, *_bound_and_scales(options))
    places = {match[1] for match in map(_GROUPS.match, checkpoint.names()) if match}
    if len(places) == 1:
        checkpoint = checkpoint.at(*places)
    groups = numbered(checkpoint, "rvqs", checkpoint.names())
    if groups:
        checkpoint.check_known(
            {f"rvqs.{number}.{name}" for number in range(len(groups)) for name in layer_names(_LAYERS)},
            modules=["rvqs"],
        )
    return _reading(_NAME, groups or [checkpoint], formula)


def _bound_and_scales(options: Options) -> tuple[str, str]:
    """Return bound and scales, of the options or of the library's version.

    Raises:
        ForeignCheckpointError: they were not given, or contradict.
    """
    if options.library_version is None:
        if options.bound is None or options.scales is None:
            raise ForeignCheckpointError(
                f"--kind {_KIND} needs --library-version, for example --library-version 1.17.8, or --bound and "
                "--scales: versions of vector-quantize-pytorch give other tokens; the model's requirements pin one"
            )
        return options.bound, options.scales
    version = tuple(map(int, options.library_version.split(".")))
    for first, below, bound, scales in _VERSIONS:
        if first <= version < below:
            return options.bound or bound, options.scales or scales
    raise ForeignCheckpointError(
        f"--library-version {options.library_version} is none of the releases whose formula is known (up to 1.18.3, "
        "1.18.5 to 1.32): pass --bound and --scales as its ResidualFSQ has them"
    )


def _reading(family: str, chains: Sequence[Checkpoint], formula: _Formula) -> Reading:
    tensors: dict[str, Floats] = {}
    widths: set[tuple[int | None, int | None]] = set()
    for part, chain in enumerate(chains):
        sizes, layers = projections_to(chain, len(formula.levels), biased=True)
        widths.add((sizes["input_dim"], sizes["output_dim"]))
        tensors |= {f"parts.{part}.{name}": array for name, array in layers.items()}
    if len(widths) > 1:
        raise chains[0].error("its groups have projections of different sizes")
    [(inputs, outputs)] = widths
    arguments = {
        "levels": list(formula.levels),
        "num_quantizers": formula.stages * len(chains),
        "bound": formula.bound,
        "scales": formula.scales,
        "groups": len(chains),
        "input_dim": None if inputs is None else inputs * len(chains),
        "output_dim": None if outputs is None else outputs * len(chains),
        "layout": "channels_first",
    }
    return Reading(family, _KIND, arguments, tensors)


def _xcodec_places(arrays: Mapping[str, ForeignArray]) -> set[str]:
    inner = len(_XCODEC_FORMULA.levels)
    shapes = [(inner, _XCODEC_WIDTH), (_XCODEC_WIDTH, inner)]
    return {
        place
        for place in places_of(arrays, f"{_LAYERS[0]}.weight")
        if re.search(r"(^|\.)quantizer\.$", place)
        and [arrays[name].shape for layer in _LAYERS if (name := f"{place}{layer}.weight") in arrays] == shapes
    }


def _read_xcodec(checkpoint: Checkpoint, options: Options) -> Reading:
    for flag, given in (
        ("--levels", options.levels),
        ("--stages", options.stages),
        ("--bound", options.bound),
        ("--scales", options.scales),
        ("--library-version", options.library_version),
    ):
        if given is not None:
            raise checkpoint.error(
                f"{flag} of {_XCODEC} is known: leave out {flag}, or pass --kind {_KIND} for a model with these sizes"
            )
    levels = ",".join(map(str, _XCODEC_FORMULA.levels))
    checkpoint.note(
        f"read as {_XCODEC}, by the sizes of its projections: levels {levels}, one stage, bound "
        f"{_XCODEC_FORMULA.bound}; --kind {_KIND} for another model"
    )
    return _reading(_XCODEC, [checkpoint], _XCODEC_FORMULA)


FAMILY = Family(_NAME, lambda _: set(), _read, kind=_KIND)
XCODEC = Family(_XCODEC, _xcodec_places, _read_xcodec)
