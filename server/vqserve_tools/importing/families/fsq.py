"""Finite scalar quantization: levels from the options, and optional projections from a checkpoint."""

from __future__ import annotations

from vqserve.errors import ForeignCheckpointError
from vqserve_tools.importing.families.checkpoint import Checkpoint
from vqserve_tools.importing.families.family import Reading
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.families.tables import projections_to


def read(checkpoint: Checkpoint, options: Options) -> Reading:
    """Return the quantizer of the options, with the projections of the checkpoint if it has any.

    Raises:
        ForeignCheckpointError: the levels were not given, or the checkpoint has a layer that is not supported.
    """
    if options.levels is None:
        raise ForeignCheckpointError(
            "--kind fsq needs --levels, for example 8,8,8,5,5,5: they are in the model's configuration, not in a "
            "checkpoint"
        )
    if options.bound is None:
        checkpoint.note("the bound is atanh by default (vector-quantize-pytorch, Cosmos); --bound changes it")
    arguments = {"levels": list(options.levels), "bound": options.bound or "atanh"}
    sizes, tensors = projections_to(checkpoint, len(options.levels))
    return Reading("finite scalar quantization", "fsq", {**arguments, **sizes}, tensors)
