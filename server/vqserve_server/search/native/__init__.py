"""The CPU's search in compiled code: search.c and its headers, and what Python tells them."""

from vqserve_server.search.native.codebook import fits
from vqserve_server.search.native.library import levels
from vqserve_server.search.native.searcher import NativeSearcher

__all__ = ["NativeSearcher", "fits", "levels"]
