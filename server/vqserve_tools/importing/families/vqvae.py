"""VQ-VAE and VQ-VAE-2 as most reproductions have them, with the moving averages of training beside the codes.

They search by distance (van den Oord et al. 2017, arXiv:1711.00937). One layout has an embedding named `_embedding`,
often with `_ema_w` and `_ema_cluster_size`; the other one has `embed`, `embed_avg` and `cluster_size`, with codes as
columns. Averages whose quotients are the codes are kept, so that training can go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vqserve_server.quantizers.declared import WEIGHT
from vqserve_tools.importing.families.checkpoint import Checkpoint, Floats, places_of, shape_text
from vqserve_tools.importing.families.family import Family, Reading
from vqserve_tools.importing.families.named import arrays_of_codes
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.families.tables import Stage, single
from vqserve_tools.importing.files import ForeignArray

_NAME, _NAME_2 = "VQ-VAE", "VQ-VAE-2"
# How far the quotients of the averages may be from the codes, as a share of the largest code.
_TOLERANCE = 1e-3
# What smooths the counts, if the model's own code was not changed.
_EPS = 1e-5


@dataclass(frozen=True)
class _Names:
    family: str
    codes: str
    sums: str
    counts: str


_ROWS = _Names(_NAME, "_embedding.weight", "_ema_w", "_ema_cluster_size")
_COLUMNS = _Names(_NAME_2, "embed", "embed_avg", "cluster_size")


def _places(arrays: Mapping[str, ForeignArray]) -> set[str]:
    found = {place for place in places_of(arrays, _ROWS.codes) if len(arrays[f"{place}{_ROWS.codes}"].shape) == 2}
    # Beside another codebook by its name, none is certain: the user must say.
    return found if len(arrays_of_codes(arrays)) <= len(found) else set()


def _read(checkpoint: Checkpoint, options: Options) -> Reading:
    checkpoint.check_known([_ROWS.codes, _ROWS.sums, _ROWS.counts], modules=["_embedding", _ROWS.sums, _ROWS.counts])
    averaged = _ROWS.sums in checkpoint or _ROWS.counts in checkpoint
    metric = options.metric_of(_NAME, "l2") if averaged else options.metric or "l2"
    decode_normalized = options.asked_decode(checkpoint, f"{checkpoint.prefix}{_ROWS.codes}", metric)
    if options.metric is None and not averaged:
        checkpoint.note(
            f"{_ROWS.codes} is the name in VQ-VAE's usual code, which searches by distance; --metric for a model that "
            "searches otherwise"
        )
    codes = checkpoint.floats(_ROWS.codes, rank=2, what="the codebook must be (K, D)")
    count = checkpoint.shape(_ROWS.counts) if _ROWS.counts in checkpoint else codes.shape[:1]
    if count != codes.shape[:1]:
        raise checkpoint.error(
            f"{checkpoint.prefix}{_ROWS.codes} is {shape_text(codes.shape)} and {_ROWS.counts} is {shape_text(count)}: "
            "a codebook is (K, D), with a count for each of its K rows"
        )
    if averaged:
        return _averaged(checkpoint, codes, _ROWS)
    return single(_NAME, Stage(codes), metric, decode_normalized=decode_normalized)


def _places_of_columns(arrays: Mapping[str, ForeignArray]) -> set[str]:
    """Return the places of VQ-VAE-2; EnCodec and vector-quantize-pytorch have a flag beside the same names."""
    return {
        place
        for place in places_of(arrays, _COLUMNS.codes)
        if {f"{place}{_COLUMNS.sums}", f"{place}{_COLUMNS.counts}"} <= set(arrays)
        and not {f"{place}inited", f"{place}initted"} & set(arrays)
        and len(arrays[f"{place}{_COLUMNS.codes}"].shape) == 2
    }


def _read_columns(checkpoint: Checkpoint, options: Options) -> Reading:
    options.decode_of(_NAME_2, options.metric_of(_NAME_2, "l2"), "raw")
    checkpoint.check_known([_COLUMNS.codes, _COLUMNS.sums, _COLUMNS.counts])
    rows, columns = shape = checkpoint.shape(_COLUMNS.codes)
    where = f"{checkpoint.prefix}{_COLUMNS.codes} is {shape_text(shape)}"
    if checkpoint.shape(_COLUMNS.counts) != (columns,) or rows == columns:
        raise checkpoint.error(
            f"{where} and {_COLUMNS.counts} is {shape_text(checkpoint.shape(_COLUMNS.counts))}: in a checkpoint of "
            "VQ-VAE-2 the codes are the columns, which this does not show; name the array with --key"
        )
    checkpoint.note(f"{where}, and its codes are the columns")
    return _averaged(checkpoint, checkpoint.columns(_COLUMNS.codes), _COLUMNS)


def _averaged(checkpoint: Checkpoint, codes: Floats, names: _Names) -> Reading:
    """Return the reading of codes with averages, which are left if their quotients are not the codes."""
    if names.sums not in checkpoint or names.counts not in checkpoint or not _give(checkpoint, codes, names):
        checkpoint.note(
            f"{names.sums} and {names.counts} do not give these codes, and were left: only training would use them"
        )
        return single(names.family, Stage(codes), "l2")
    tensors = {
        WEIGHT: codes,
        "embedding.cluster_size": checkpoint.floats(names.counts),
        "embedding.embed_avg": (checkpoint.floats if names is _ROWS else checkpoint.columns)(names.sums),
    }
    return Reading(names.family, "ema", {"n_embed": codes.shape[0], "embedding_dim": codes.shape[1]}, tensors)


def _give(checkpoint: Checkpoint, codes: Floats, names: _Names) -> bool:
    """Return whether the quotients of the averages are the codes."""
    sums, counts = (checkpoint.names()[name].read().astype(np.float64) for name in (names.sums, names.counts))
    if names is _COLUMNS:
        # This layout divides by smoothed counts, the other one has smoothed them already.
        total = counts.sum()
        sums, counts = sums.T, (counts + _EPS) / (total + len(counts) * _EPS) * total
    if sums.shape != codes.shape or counts.shape != codes.shape[:1]:
        return False
    with np.errstate(all="ignore"):
        difference = np.abs(sums / counts[:, None] - codes).max(initial=0.0)
    return bool(difference <= _TOLERANCE * np.abs(codes).max(initial=0.0))


FAMILY = Family(_NAME, _places, _read)
COLUMNS = Family(_NAME_2, _places_of_columns, _read_columns)
