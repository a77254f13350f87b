"""Earlier names of modules, so that the pickles of earlier releases can still be loaded.

A pickle names the module of each class. A name is kept here for one release after its module has moved.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module
from types import ModuleType

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
    """Let each earlier name give what the module has that its classes are in now, which is imported when it is used."""
    for earlier, now in _NEW_NAMES.items():
        module = ModuleType(f"{_PACKAGE}.{earlier}")
        module.__getattr__ = partial(_attribute, now)  # type: ignore[method-assign]
        sys.modules.setdefault(module.__name__, module)


def _attribute(module: str, name: str) -> object:
    # Code that walks through all modules, as torch does when it is imported, asks for `__file__`.
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(import_module(f"{_PACKAGE}.{module}"), name)
