"""Exact search for the nearest code or the greatest score (docs/exact-search.md).

`prepare` makes a `Searcher` from a codebook; the searcher then maps rows to indices. With every backend the result is
the code that wins in exact arithmetic on the given numbers, the lowest index among equals.
"""

from vqserve_server.search.backends import available, compiled, prepare, why_slower
from vqserve_server.search.searcher import CountingSearcher, Objective, SearchCounts, Searcher

__all__ = [
    "CountingSearcher",
    "Objective",
    "SearchCounts",
    "Searcher",
    "available",
    "compiled",
    "prepare",
    "why_slower",
]
