"""Rows that a training does not see, to measure how well its codebook fits latents that are new to it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vqserve.errors import InvalidOption
from vqserve_tools.latents.rows import Ints, RandomRows, Subset

# Share of a data set that is held out by default.
DATA_SET_SHARE = 0.05
# The figures of fewer groups would depend too much on which groups were drawn.
_LEAST_GROUPS = 5


@dataclass(frozen=True, kw_only=True)
class Split:
    """Rows for the training, and rows that are held out.

    Attributes:
        training: rows for the training.
        held_out: rows that are held out.
        unit: what is held out as a whole, in plural: "rows" or, for example, "items".
        held_out_units: number of these that are held out.
        units: number of all of these.
    """

    training: RandomRows
    held_out: RandomRows
    unit: str
    held_out_units: int
    units: int


def split(rows: RandomRows, share: float, *, seed: int) -> Split:
    """Hold out a random share of latents.

    Neighbouring rows of one picture or recording are alike. If some of them were held out and the others trained on,
    the gap of the errors would be too small. So whole items of a data set are held out if the share is at least five
    of them, otherwise entries of the batch axis if it is at least five of these, otherwise single rows.

    Args:
        rows: latents.
        share: share of the groups, in (0, 1).
        seed: seed of the choice.

    Raises:
        InvalidOption: nothing would be held out, or nothing would be left.
    """
    # With a sequence the generator is another than that of the training with this seed.
    rng = np.random.default_rng([seed, 2])
    unit, units, group = _groups(rows, share)
    count = round(share * units)
    if not 0 < count < units:
        raise InvalidOption(f"{{option}} {share} of {units} {unit} is {count}", option="held_out")
    chosen = np.zeros(units, bool)
    chosen[rng.choice(units, count, replace=False)] = True
    is_held_out = chosen if group is None else chosen[group]
    return Split(
        training=Subset(rows, np.flatnonzero(~is_held_out)),
        held_out=Subset(rows, np.flatnonzero(is_held_out)),
        unit=unit,
        held_out_units=count,
        units=units,
    )


def _groups(rows: RandomRows, share: float) -> tuple[str, int, Ints | None]:
    """Return what is held out as a whole, how many there are, and the number of each row's; None: each is a row."""
    for unit, groups in rows.groupings():
        values, group = np.unique(groups, return_inverse=True)
        if round(share * len(values)) >= _LEAST_GROUPS:
            return unit, len(values), group
    return "rows", len(rows), None
