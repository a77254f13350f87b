"""Launches by Triton, which compiles a variant when it is first used, or interprets it with TRITON_INTERPRET=1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vqserve_server.search.cuda.launcher import LaunchFailed
from vqserve_server.search.cuda.variants import Variant


class JitLauncher:
    """A `Launcher` that needs Triton, and for CUDA a C compiler at run time."""

    def launch(self, variant: Variant, grid: tuple[int, int], args: Sequence[Tensor | int | float]) -> None:
        """Launch a variant; see `Launcher.launch`."""
        options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
        try:
            function(variant.kernel)[grid](*args, **dict(variant.constants), **options)
        except Exception as error:
            # Of Triton, of the C compiler that it runs, of the cache's folder, of the driver.
            raise LaunchFailed(f"{type(error).__name__}: {error}") from error


def function(kernel: str) -> Any:
    """Return Triton's form of a kernel."""
    from vqserve_server.search.cuda import kernels  # noqa: PLC0415

    return getattr(kernels, kernel)
