"""Finite scalar quantization: levels from the options, and optional projections from a checkpoint."""

from __future__ import annotations

import re

from vqserve.errors import ForeignCheckpointError
from vqserve_tools.importing.families.checkpoint import Checkpoint
from vqserve_tools.importing.families.family import Family, Reading
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.families.tables import projections_to

_PROJECTION = "project_in.weight"
# X-Codec 2 and NeuCodec: a residual quantizer with the keys of this one, recognized by its module or by its sizes.
_XCODEC = re.compile(r"(?:^|\.)generator\.quantizer\.project_in\.")
_XCODEC_LEVELS, _XCODEC_SHAPE = (4,) * 8, (8, 2048)


def _read(checkpoint: Checkpoint, options: Options) -> Reading:
    """Return the quantizer of the options, with the projections of the checkpoint if it has any.

    Raises:
        ForeignCheckpointError: the levels were not given, or the checkpoint has a layer that is not supported.
    """
    if options.levels is None:
        raise ForeignCheckpointError(
            "--kind fsq needs --levels, for example --levels 8,8,8,5,5,5: they are in the model's configuration, not "
            "in a checkpoint"
        )
    _check_residual(checkpoint, options.levels)
    if options.bound is None:
        checkpoint.note("the bound is atanh by default (vector-quantize-pytorch, Cosmos); --bound changes it")
    arguments = {"levels": list(options.levels), "bound": options.bound or "atanh"}
    sizes, tensors = projections_to(checkpoint, len(options.levels))
    if tensors:
        checkpoint.note(
            "project_in and project_out are also the keys of a residual quantizer (ResidualFSQ), which gives other "
            "tokens, even with one stage: --verify shows it"
        )
    return Reading("finite scalar quantization", "fsq", {**arguments, **sizes}, tensors)


def _check_residual(checkpoint: Checkpoint, levels: tuple[int, ...]) -> None:
    """Check that the projections are not those of X-Codec 2 or NeuCodec.

    Raises:
        ForeignCheckpointError: they are; their ResidualFSQ bounds twice and gives other tokens.
    """
    for name, array in checkpoint.names().items():
        full = f"{checkpoint.prefix}{name}"
        sizes = full.endswith(_PROJECTION) and levels == _XCODEC_LEVELS and array.shape == _XCODEC_SHAPE
        if sizes or _XCODEC.search(full):
            raise checkpoint.error(
                f"{full} is of X-Codec 2 or NeuCodec, whose quantizer is a residual one (ResidualFSQ): finite scalar "
                "quantization would give other tokens: leave out --kind and --levels, or pass --kind residual_fsq"
            )


FAMILY = Family("finite scalar quantization", lambda _: set(), _read, kind="fsq")
