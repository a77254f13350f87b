"""Whether a codebook's rows or its columns are the codes: arrays with a number for each code, beside it, say it."""

from __future__ import annotations

import re

from vqserve_tools.importing.families.checkpoint import Checkpoint, shape_text
from vqserve_tools.importing.families.name_lists import keys_text

# One number for each code, and a sum for each code.
_COUNTS = re.compile(r"(?:\w*_)?cluster_(?:size|usage)|_?ema_count|embed_prob")
_SUMS = re.compile(r"embed_avg|_?ema_w")


def check_counts(checkpoint: Checkpoint, name: str, *, by_key: bool = False) -> bool:
    """Check a codebook against the counts and sums of its codes, if the checkpoint has any.

    Args:
        checkpoint: view that has the codebook.
        name: name of the codebook in the view, of shape (K, D), or (n, K, D).
        by_key: whether the user named the codebook.

    Returns:
        Whether there are counts that only one orientation fits.

    Raises:
        ForeignCheckpointError: they contradict: the codes are the other axis, or the codebook is damaged.
    """
    shape = checkpoint.shape(name)
    rows, columns = shape[-2:]
    transpose = f"{checkpoint.prefix}{name}" in checkpoint.ledger.columns
    codes, other = (columns, rows) if transpose else (rows, columns)
    is_known = False
    for beside, array in _beside(checkpoint, name).items():
        last = beside.rpartition(".")[2]
        if _SUMS.fullmatch(last) and len(array) > 1 and array[-2:] != shape[-2:]:
            raise checkpoint.error(
                f"{checkpoint.prefix}{name} is {shape_text(shape)}, and {checkpoint.prefix}{beside} is "
                f"{shape_text(array)}: they should have one shape, so the codebook is not as it was trained"
            )
        if not _COUNTS.fullmatch(last) or not array:
            continue
        if array[-1] == codes:
            is_known = is_known or codes != other
            continue
        what = "it should have a number for each code, so one of them is damaged"
        if array[-1] == other and transpose:
            what = "its codes are the rows: leave out --transpose"
        elif array[-1] == other:
            key = "" if by_key else f"{keys_text([checkpoint.prefix + name])} "
            what = f"its codes are the columns: pass {key}--transpose"
        raise checkpoint.error(
            f"{checkpoint.prefix}{name} is {shape_text(shape)}, and {checkpoint.prefix}{beside} has {array[-1]}: {what}"
        )
    return is_known


def _beside(checkpoint: Checkpoint, name: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays in the module of a codebook; a `weight` has the module around its layer, too."""
    places = {"".join(end.rpartition(".")[:2]) for end in (name, name.removesuffix(".weight"))}
    names = checkpoint.names()
    return {
        other: names[other].shape for other in names if other != name and "".join(other.rpartition(".")[:2]) in places
    }
