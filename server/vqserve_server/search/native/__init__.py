"""The CPU's search in compiled code: scan.c, and what Python tells it."""

from vqserve_server.search.native.codebook import fits
from vqserve_server.search.native.library import levels
from vqserve_server.search.native.searcher import NativeSearcher

__all__ = ["NativeSearcher", "fits", "levels"]
