"""Exact search for the nearest code or the greatest score (docs/exact-search.md).

`prepare` makes a `Searcher` from a codebook; the searcher then maps rows to indices. With every backend the result is
the code that wins in exact arithmetic on the given numbers, the lowest index among equals.
`prepare_arrays` does the same for numpy arrays by the compiled search alone, and does not import torch; what takes
tensors is imported on first use.
"""

import importlib
from typing import TYPE_CHECKING

from vqserve_server.search.arrays import prepare_arrays
from vqserve_server.search.searcher import CountingSearcher, Objective, RowSearcher, SearchCounts, Searcher

if TYPE_CHECKING:
    from vqserve_server.search.backends import available, prepare, why_slower

__all__ = [
    "CountingSearcher",
    "Objective",
    "RowSearcher",
    "SearchCounts",
    "Searcher",
    "available",
    "prepare",
    "prepare_arrays",
    "why_slower",
]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(importlib.import_module("vqserve_server.search.backends"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
