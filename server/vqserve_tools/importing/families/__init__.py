"""The families of foreign checkpoints (docs/codebooks.md lists them).

Each family has one module. It defines the keys by which the family is recognised, and how its arrays are read.
"""

from vqserve_tools.importing.families import dac, encodec, fsq, gumbel, lfq, llamagen, lucidrains, mimi, simvq, taming
from vqserve_tools.importing.families.family import Family

# A checkpoint is compared with the families in this order: distinctive keys first, ambiguous keys last.
FAMILIES: tuple[Family, ...] = (
    mimi.FAMILY,
    dac.FAMILY,
    lucidrains.FAMILY,
    encodec.FAMILY,
    simvq.FAMILY,
    gumbel.FAMILY,
    llamagen.FAMILY,
    lfq.FAMILY,
    fsq.FAMILY,
    taming.FAMILY,
)

__all__ = ["FAMILIES", "Family"]
