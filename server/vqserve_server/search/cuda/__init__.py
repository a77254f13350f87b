"""Exact search on CUDA by kernels of our own (docs/exact-search.md).

`kernels.py` is their source, in Triton. `variants.py` says how each is compiled for an architecture, without Triton, so
that compiled kernels can be run where Triton is not installed. A `Launcher` runs a variant: `jit.py` by Triton, which
compiles it when it is first used.
"""

from vqserve_server.search.cuda.searcher import CudaSearcher, fits, is_available, why_unavailable

__all__ = ["CudaSearcher", "fits", "is_available", "why_unavailable"]
