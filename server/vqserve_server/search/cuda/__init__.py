"""Exact search on CUDA by kernels of our own (docs/exact-search.md).

`kernels.py` is their source, in Triton. `variants.py` says how each is compiled for an architecture, without Triton, so
that compiled kernels can be run where Triton is not installed. A `Launcher` runs a variant: that of `choice.py` has
kernels that were compiled ahead of time (`cubins.py`) and loads them through CUDA's driver (`driver.py`); with that of
`jit.py` Triton compiles a variant when it is first used.
"""

from vqserve_server.search.cuda.choice import is_available, kernel_searcher, why_unavailable
from vqserve_server.search.cuda.searcher import fits

__all__ = ["fits", "is_available", "kernel_searcher", "why_unavailable"]
