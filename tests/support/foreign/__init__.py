"""Small checkpoints of foreign families with the formulas of their quantizers, for tests of imports."""

from support.foreign import arrays, audio, grids, images, lucidrains, recent_codecs, recent_others
from support.foreign.case import CASES, RNG, Case, N, normal, write

__all__ = [
    "CASES",
    "RNG",
    "Case",
    "N",
    "arrays",
    "audio",
    "grids",
    "images",
    "lucidrains",
    "normal",
    "recent_codecs",
    "recent_others",
    "write",
]
