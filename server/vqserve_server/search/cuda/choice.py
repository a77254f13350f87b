"""The choice of what launches the kernels on a device: compiled ones through the driver, else Triton, else nothing."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vqserve_server.event_log import ONCE, event
from vqserve_server.search.cuda import cubins
from vqserve_server.search.cuda.driver import Driver, DriverError
from vqserve_server.search.cuda.jit import JitLauncher
from vqserve_server.search.cuda.launcher import Launcher, LaunchFailed
from vqserve_server.search.cuda.searcher import CudaSearcher
from vqserve_server.search.cuda.variants import Variant, architecture_of
from vqserve_server.search.searcher import Objective, OnDemand, SearchCounts, Searcher

logger = logging.getLogger(__name__)


def is_available(device: torch.device) -> bool:
    """Return whether kernels run on the device: CUDA, or any device with TRITON_INTERPRET=1."""
    return why_unavailable(device) is None


def why_unavailable(device: torch.device) -> str | None:
    """Return why no kernel can be launched on the device, which is logged once for CUDA; None: they can."""
    try:
        launcher_for(device)
    except cubins.Unusable as error:
        return str(error)
    return None


def launcher_for(device: torch.device) -> Launcher:
    """Return what launches kernels on a device.

    Raises:
        Unusable: nothing does.
    """
    if device.type == "cuda" and not _is_interpreted():
        try:
            return _compiled(torch.cuda.current_device() if device.index is None else device.index)
        except cubins.Unusable as error:
            why_not_compiled = str(error)
        why_not_triton = _why_no_triton()
        _tell(why_not_compiled, why_not_triton)
        if why_not_triton is None:
            return JitLauncher()
        raise cubins.Unusable(f"{why_not_compiled}, and {why_not_triton}")
    if importlib.util.find_spec("triton") is None:
        raise cubins.Unusable("Triton is not installed: `pip install triton`")
    if not _is_interpreted():
        raise cubins.Unusable("kernels run on CUDA only")
    return JitLauncher()


@functools.cache
def _compiled(device: int) -> Launcher:
    # The files come first: a machine without them may have no CUDA either.
    index = cubins.read_index(cubins.FOLDER)
    capability = torch.cuda.get_device_capability(device)
    try:
        driver = Driver(device)
    except DriverError as error:
        raise cubins.Unusable(f"the compiled kernels cannot be loaded: {error}") from error
    stream = lambda: torch.cuda.current_stream(device).cuda_stream  # noqa: E731
    return CompiledLauncher(index, cubins.FOLDER, capability, driver, stream)


@functools.cache
def _tell(why_not_compiled: str, why_not_triton: str | None) -> None:
    if why_not_triton is None:
        text = event("search_kernels", by="Triton, which compiles them at their first use", reason=why_not_compiled)
        logger.info(text, extra=ONCE)
        return
    reason = f"{why_not_compiled}, and {why_not_triton}"
    logger.warning(event("search_kernels", slower="torch searches on the GPU", reason=reason), extra=ONCE)


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


def _why_no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: `pip install triton`"
    # Triton compiles a launcher at run time.
    if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
        return "Triton finds no C compiler: install gcc or clang, or set CC"
    return None


class CompiledLauncher:
    """A `Launcher` of kernels that were compiled ahead of time, for one device: no Triton, no compiler."""

    def __init__(
        self,
        index: cubins.Index,
        folder: Path,
        capability: tuple[int, int],
        driver: Driver,
        stream: Callable[[], int],
    ) -> None:
        """Load every kernel that the device may need.

        Args:
            index: of the folder.
            folder: where the compiled kernels are.
            capability: the device's compute capability.
            driver: the device's driver.
            stream: returns the handle of torch's current stream of the device.

        Raises:
            Unusable: the kernels are not for this device, or the driver does not take them.
        """
        self._stream = stream
        found = cubins.cubins_for(index, capability, architecture_of(capability))
        try:
            self._kernels = {
                one.name: driver.load(
                    cubins.read(one, folder), one.entry, one.arguments, warps=one.warps, shared=one.shared
                )
                for one in found
            }
        except DriverError as error:
            raise cubins.Unusable(f"the compiled kernels cannot be loaded: {error}") from error

    def launch(self, variant: Variant, grid: tuple[int, int], args: Sequence[Tensor | int | float]) -> None:
        """Launch a variant; see `Launcher.launch`.

        Raises:
            ValueError: an address is not aligned as the signature says. The GPU would fail, for all that comes later.
        """
        values = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in args]
        for (name, kind), value in zip(variant.signature, values, strict=True):
            if kind.endswith(":16") and int(value) % 16:
                raise ValueError(f"{name} is not aligned to 16 bytes")
        try:
            self._kernels[variant.name].launch((*grid, 1), values, self._stream())
        except DriverError as error:
            raise LaunchFailed(str(error)) from error


def kernel_searcher(
    codes: Tensor, bias: Tensor | None, objective: Objective, *, fallback: Callable[[], Searcher]
) -> Searcher:
    """Return a searcher by kernels for a codebook that they take.

    Args:
        codes: (K, D) float32.
        bias: (K,) float32, for DOT.
        objective: quantity by which the winning code is chosen.
        fallback: factory of the searcher for rows that the kernels cannot decide, and for all rows if they fail.

    Raises:
        Unusable: nothing launches kernels on this device.
    """
    own = CudaSearcher(codes, bias, objective, fallback=fallback, launcher=launcher_for(codes.device))
    return _UntilFailed(own, OnDemand(fallback, codes.device))


class _UntilFailed(Searcher):
    """Searches by kernels until one cannot be launched, and by the fallback from then on."""

    def __init__(self, searcher: Searcher, fallback: OnDemand) -> None:
        self._searcher = searcher
        self._fallback = fallback
        self._reason: str | None = None
        self.backend = searcher.backend

    def search(self, rows: Tensor, counts: SearchCounts | None = None) -> Tensor:
        """Return the winning code of every row; see `Searcher.search`."""
        if self._reason is None:
            try:
                return self._searcher.search(rows, counts)
            except LaunchFailed as error:
                self._reason = f"a kernel could not be launched: {error}"
                logger.warning(
                    event("search_kernel_failed", slower="torch searches from now on", reason=error), exc_info=True
                )
        return self._fallback(self._reason).search(rows, counts)
