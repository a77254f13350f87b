"""How a searcher launches a kernel, whoever compiled it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from vqserve_server.search.cuda.variants import Variant


class LaunchFailed(Exception):
    """A kernel could not be compiled or launched: it has not run."""


class Launcher(Protocol):
    """Launches variants of kernels on the current CUDA device and stream; thread-safe."""

    def launch(self, variant: Variant, grid: tuple[int, int], args: Sequence[Tensor | int | float]) -> None:
        """Launch `grid` programs of a variant and return without waiting for them.

        Args:
            variant: one of `all_variants(architecture)` of the device.
            grid: numbers of programs in two dimensions, both at least 1.
            args: one per entry of `variant.signature`: a contiguous tensor on the device for a pointer, else a number.

        Raises:
            LaunchFailed: it could not be compiled or launched.
        """
