"""Arrays named by the user: a codebook (K, D), or the stages of a residual codebook."""

from __future__ import annotations

from collections.abc import Sequence

from vqserve_tools.importing.families.checkpoint import Checkpoint, Floats, shape_text
from vqserve_tools.importing.families.family import Reading
from vqserve_tools.importing.families.options import Options
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
    for key in keys:
        _check_orientation(checkpoint, key)
    if options.kind == "rvq" or len(keys) > 1:
        chain = Chain([Stage(codes) for codes in _stages(checkpoint, keys)])
        return residual(
            checkpoint,
            "arrays of codes",
            [chain],
            metric,
            decode_normalized=decode_normalized,
            normalize_residuals=options.normalize_residuals,
        )
    hint = ": one of (n_q, K, D) is a residual one with --kind rvq" if len(checkpoint.shape(keys[0])) == 3 else ""
    codes = checkpoint.floats(keys[0], rank=2, what=f"the codebook must be (K, D){hint}")
    return single("an array of codes", Stage(codes), metric, decode_normalized=decode_normalized)


def _check_orientation(checkpoint: Checkpoint, key: str) -> None:
    """Check that codes are rows, not columns as in the first VQ-VAEs; add a note if both are possible.

    Raises:
        ForeignCheckpointError: the checkpoint has a count for each column, so the codes are columns.
    """
    shape = checkpoint.shape(key)
    if len(shape) < 2 or shape[-1] <= shape[-2]:
        return
    num_codes, width = shape[-2:]
    counts = f"{key.rpartition('.')[0]}.cluster_size".removeprefix(".")
    if counts in checkpoint and checkpoint.shape(counts) == (width,):
        raise checkpoint.error(
            f"{key} is {shape_text(shape)} and {counts} has {width}: its codes are columns, and a codebook is (K, D); "
            "save the array's transpose with numpy.save and import that"
        )
    checkpoint.note(
        f"{key or 'array'} was read as {num_codes} codes of width {width}; if its codes are the columns, save its "
        "transpose with numpy.save and import that"
    )


def _stages(checkpoint: Checkpoint, keys: Sequence[str]) -> list[Floats]:
    if len(keys) == 1 and len(checkpoint.shape(keys[0])) == 3:
        stages = list(checkpoint.floats(keys[0]))
        if not stages:
            raise checkpoint.error(f"{keys[0] or 'array'} has no stages")
        return stages
    what = "a residual codebook is one array (n_q, K, D), or an array (K, D) for each stage"
    return [checkpoint.floats(key, rank=2, what=what) for key in keys]
