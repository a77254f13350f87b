"""Reloads the repository on a thread, one reload after the other, and frees the memory of replaced codebooks."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import time
from collections.abc import Callable

from vqserve_server.console import event
from vqserve_server.repository.load import Repository


def free_memory() -> None:
    """Free reference cycles, and return free memory to the system.

    The traceback of a rejected request is a cycle that keeps its codebook. glibc keeps freed tables in the middle of
    its heaps, and a hundred reloads leave many such holes.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


logger = logging.getLogger(__name__)


class Reloader:
    """Reloads a repository when asked. Belongs to one event loop."""

    def __init__(self, repository: Repository, on_done: Callable[[], None]) -> None:
        """Do nothing yet; `on_done` is called, on the loop, after every reload."""
        self._repository = repository
        self._on_done = on_done
        self._is_requested = False
        self._task: asyncio.Task[None] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a reload is running."""
        return self._task is not None

    def request(self) -> None:
        """Start a reload, or one more after the reload that is running, which may have missed a change."""
        self._is_requested = True
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while self._is_requested:
            self._is_requested = False
            started = time.monotonic()
            try:
                counts = await asyncio.to_thread(self._repository.reload)
                self._on_done()
                await asyncio.to_thread(free_memory)
            except Exception:
                # The codebooks that were live stay live.
                logger.exception(event("reload_failed"))
            else:
                logger.info(event("reload_done", seconds=time.monotonic() - started, **vars(counts)))
        self._task = None
