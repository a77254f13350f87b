"""Looks at the codebook files again and again, and says when they have changed and are whole. No torch."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from vqserve_server.codebook_files import find_codebooks
from vqserve_server.event_log import event
from vqserve_server.file_stamps import CLOCK_S, last_change_s, stamp_of

logger = logging.getLogger(__name__)

# What is served under which name and why something is not; and each file's device, inode, size and times of change.
_Look = tuple[object, ...]


class Rescan:
    """Looks at the sources of a server in an interval.

    A change counts when two looks see the same, and no file has changed for two seconds before the later one: so a file
    that is being copied is left alone. (What is incomplete then all the same is rejected by the reload.) A change is
    reported once, also if the reload rejects it.
    """

    def __init__(self, sources: Sequence[str], seconds: float) -> None:
        """Look for the first time. Call it before the codebooks are loaded, so that no later change is missed.

        Args:
            sources: what the command line names; see `find_codebooks`.
            seconds: from one look to the next; 0: `run` never looks.
        """
        self._sources = list(sources)
        self._seconds = seconds
        self._reported, _ = _look(self._sources)
        self._seen = self._reported

    async def run(self, on_change: Callable[[], None]) -> None:
        """Look until the task is cancelled; `on_change` is called, on the event loop, after each change."""
        while self._seconds:
            await asyncio.sleep(self._seconds)
            try:
                # A file system that does not answer holds up this task only.
                has_changed = await asyncio.to_thread(self.has_changed)
            except Exception:
                logger.exception(event("rescan_failed"))
                continue
            if has_changed:
                logger.info(event("files_changed"))
                on_change()

    def has_changed(self) -> bool:
        """Look once more; return whether there is a change that was not reported yet."""
        before = self._seen
        self._seen, is_settled = _look(self._sources)
        if self._seen == self._reported or self._seen != before or not is_settled:
            return False
        self._reported = self._seen
        return True


def _look(sources: Sequence[str]) -> tuple[_Look, bool]:
    """Return what the sources hold, and whether no file of it has changed just now."""
    found = find_codebooks(sources)
    stamps = {name: stamp_of(path) for name, path in found.files.items()}
    # What changed just now may still be being written. A clock that is ahead of ours must not hold up changes for ever.
    is_settled = not 0 <= time.time() - last_change_s(stamps.values()) < CLOCK_S
    problems = [problem.text for problem in found.problems]
    return (found.files, stamps, problems, found.labels), is_settled
