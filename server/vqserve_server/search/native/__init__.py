"""Search on the CPU in compiled code: search.c with its headers, and their Python side.

It computes on numpy arrays and does not import torch; `tensors` has it for callers with tensors.
"""

from vqserve_server.search.native.codebook import fits
from vqserve_server.search.native.library import levels, why_unusable
from vqserve_server.search.native.searcher import NativeSearcher

__all__ = ["NativeSearcher", "fits", "levels", "why_unusable"]
