"""The families of foreign checkpoints, in the order in which a file is held against them.

One module a family (docs/codebooks.md lists them): which keys it is known by, and what becomes of its arrays.
"""

from vqserve_tools.importing.families import dac, encodec, gumbel, lfq, llamagen, lucidrains, mimi, simvq, taming
from vqserve_tools.importing.families.family import Family

# The distinctive keys first, the ambiguous ones last.
FAMILIES: tuple[Family, ...] = (
    mimi.FAMILY,
    dac.FAMILY,
    lucidrains.FAMILY,
    encodec.FAMILY,
    simvq.FAMILY,
    gumbel.FAMILY,
    llamagen.FAMILY,
    lfq.FAMILY,
    taming.FAMILY,
)

__all__ = ["FAMILIES", "Family"]
