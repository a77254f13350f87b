"""Rescans one after the other, off the event loop, and memory of replaced codebooks given back."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import time
from collections.abc import Callable

from vqserve_server.repository.load import Repository


def give_back() -> None:
    """Free what refers to itself in circles, and give free memory back to the system.

    The traceback of a refused request is such a circle, and holds the codebook that refused it. glibc keeps tables that
    were freed in the middle of its heaps, and after a hundred swaps there are many such holes.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


logger = logging.getLogger(__name__)


class Rescans:
    """Rescans a repository when asked, and says when that is done. Belongs to one event loop."""

    def __init__(self, repository: Repository, on_done: Callable[[], None]) -> None:
        """Do nothing yet; `on_done` is called, on the loop, after every rescan."""
        self._repository = repository
        self._on_done = on_done
        self._is_wanted = False
        self._task: asyncio.Task[None] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a rescan goes on."""
        return self._task is not None

    def ask(self) -> None:
        """Have the repository rescanned: now, or, as the rescan that goes on may have missed something, once more."""
        self._is_wanted = True
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while self._is_wanted:
            self._is_wanted = False
            began = time.monotonic()
            try:
                tally = await asyncio.to_thread(self._repository.rescan)
                self._on_done()
                await asyncio.to_thread(give_back)
            except Exception:
                # What was live stays so.
                logger.exception("the rescan failed")
            else:
                logger.info("rescanned in %.2f s: %s", time.monotonic() - began, tally)
        self._task = None
