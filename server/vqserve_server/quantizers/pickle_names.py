"""Earlier names of modules, so that the pickles of earlier releases can still be loaded.

A pickle names the module of each class. A name is kept here for one release after its module has moved.
"""

from __future__ import annotations

import sys
from importlib import import_module

_PACKAGE = "vqserve_server.quantizers"
_NEW_NAMES = {
    "cosine": "lookup",
    "dot": "lookup",
    "embedding_ema": "ema",
    "frozen": "inference.base",
    "frozen_lookup": "inference.lookup",
    "frozen_residual": "inference.residual",
    "frozen_scalar": "inference.scalar",
    "fsq": "scalar",
    "lfq": "scalar",
    "projection": "projected",
    "remapped": "remap",
    "residual_structure": "inference.residual",
    "search_problem": "objective",
    "table": "inference.lookup",
    "weight_norm": "vector",
}


def register_earlier_names() -> None:
    """Let each earlier name import the module that has its classes now."""
    for earlier, now in _NEW_NAMES.items():
        sys.modules.setdefault(f"{_PACKAGE}.{earlier}", import_module(f"{_PACKAGE}.{now}"))
