"""Earlier names of modules, which pickles of earlier releases have: they stay importable for one release."""

from __future__ import annotations

import sys
from importlib import import_module

_PACKAGE = "vqserve_server.quantizers"
_MOVED = {
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


def keep_earlier_names() -> None:
    """Make `import vqserve_server.quantizers.cosine` and the like give the modules that the classes are in now."""
    for earlier, now in _MOVED.items():
        sys.modules.setdefault(f"{_PACKAGE}.{earlier}", import_module(f"{_PACKAGE}.{now}"))
