"""Arrays named by the user: a codebook (K, D), the stages of a residual codebook, or one codebook per group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vqserve_tools.importing.families.checkpoint import Checkpoint, Floats, shape_text
from vqserve_tools.importing.families.family import Reading
from vqserve_tools.importing.families.names import is_running
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.families.orientation import check_counts
from vqserve_tools.importing.families.tables import Chain, Stage, residual, single
from vqserve_tools.importing.files import UNNAMED

_WHY = "some models search by distance, some by cosine, some by dot product"


def read(checkpoint: Checkpoint, options: Options) -> Reading:
    """Return the codebook of the arrays in `options.keys`, or of the only array of a file without names.

    Raises:
        ForeignCheckpointError: an array is missing or is not a codebook, or the metric was not given.
    """
    metric = options.asked_metric(checkpoint, "an array of codes", _WHY)
    decode_normalized = options.asked_decode(checkpoint, "an array of codes", metric)
    keys = options.keys or (UNNAMED,)
    for key in dict.fromkeys(keys):
        _check_orientation(checkpoint, key, transpose=options.transpose)
        if is_running(key):
            checkpoint.note(f"{key} is a running sum or a counter by its name: it may not be the codes")
    stages = [Stage(codes) for codes in _codebooks(checkpoint, keys, options)]
    if options.groups:
        if len(stages) == 1:
            raise checkpoint.error("--groups needs a codebook for each group: it has one, leave out --groups")
        chains = [Chain([stage]) for stage in stages]
        family = "codebooks of groups of the channels"
    elif options.kind == "rvq" or len(stages) > 1:
        chains = [Chain(stages)]
        family = "arrays of codes"
    else:
        return single("an array of codes", stages[0], metric, decode_normalized=decode_normalized)
    if len(keys) > 1 and not options.groups:
        checkpoint.note(
            f"the {len(keys)} arrays are the stages of a residual quantizer; --groups for groups of the channels"
        )
    return residual(
        checkpoint,
        family,
        chains,
        metric,
        decode_normalized=decode_normalized,
        are_groups=options.groups,
        normalize_residuals=options.normalize_residuals,
    )


def _check_orientation(checkpoint: Checkpoint, key: str, *, transpose: bool) -> None:
    """Check that codes are rows, or columns if `transpose` says so; add a note if both are possible.

    Raises:
        ForeignCheckpointError: the checkpoint has counts for the codes, and they contradict.
    """
    shape = checkpoint.shape(key)
    if len(shape) not in (2, 3):
        return
    *_, rows, columns = shape
    name = key or "array"
    if transpose:
        checkpoint.has_codes_in_columns(key)
    is_known = check_counts(checkpoint, key, by_key=True)
    if transpose:
        checkpoint.note(f"{name} was transposed: its columns are the codes, {columns} of width {rows}")
    elif rows == columns and not is_known:
        checkpoint.note(f"{name} is square: its rows are the codes; if the columns are, pass --transpose")
    elif rows < columns and not is_known:
        checkpoint.note(
            f"{name} was read as {rows} codes of width {columns}; if the columns are the codes, pass --transpose"
        )


def _codebooks(checkpoint: Checkpoint, keys: Sequence[str], options: Options) -> list[Floats]:
    """Return the codebooks (K, D) of the arrays, in order."""
    if len(keys) == 1 and len(checkpoint.shape(keys[0])) == 3:
        shape = checkpoint.shape(keys[0])
        name = keys[0] or "array"
        if not (options.groups or options.kind == "rvq"):
            raise checkpoint.error(
                f"{name} has shape {shape_text(shape)}: the codebook must be (K, D), and {shape[0]} of them "
                "may be the stages of a residual quantizer, or quantize groups of the channels; look it up in the "
                "model, and pass --kind rvq or --groups"
            )
        if not shape[0]:
            raise checkpoint.error(f"{name} has no stages")
        codebooks = list(checkpoint.floats(keys[0]))
    else:
        several = len(keys) > 1 or options.kind == "rvq" or options.groups
        what = (
            "a residual codebook is one array (n_q, K, D), or an array (K, D) for each stage"
            if several
            else "the codebook must be (K, D)"
        )
        codebooks = [checkpoint.floats(key, rank=2, what=what) for key in keys]
    return [np.ascontiguousarray(codes.T) for codes in codebooks] if options.transpose else codebooks
