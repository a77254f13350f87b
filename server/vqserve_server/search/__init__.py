"""Nearest code and greatest score, exactly (docs/exact-search.md).

`prepare` turns a codebook into a `Searcher` once; the searcher then maps rows to indices. Whatever the backend, the
answer is the code that wins in exact arithmetic on the given numbers, the lowest index among equals. `margins` says
what the winners are worth.
"""

from vqserve_server.search.backends import available, prepare
from vqserve_server.search.margins import Margins, margins
from vqserve_server.search.searcher import Objective, SearchCounts, Searcher

__all__ = ["Margins", "Objective", "SearchCounts", "Searcher", "available", "margins", "prepare"]
