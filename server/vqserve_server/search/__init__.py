"""Nearest code and greatest score, exactly (docs/exact-search.md).

`prepare` turns a codebook into a `Searcher` once; the searcher then maps rows to indices. Whatever the backend, the
answer is the code that wins in exact arithmetic on the given numbers, the lowest index among equals.
"""

from vqserve_server.search.backends import available, prepare
from vqserve_server.search.searcher import Objective, SearchCounts, Searcher

__all__ = ["Objective", "SearchCounts", "Searcher", "available", "prepare"]
