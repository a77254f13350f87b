"""Memory that a parent process shares with its workers, and that stays when a worker is killed."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping

# Prefix of environment variables that say where a worker's part is; they are not settings for users.
_VARIABLE = "_VQSERVE_MEMORY_"


class SharedMemory:
    """Zeroed memory, a part for each worker. What nobody has written to takes no memory.

    Attributes:
        descriptor: of the file behind it, which a worker inherits.
    """

    def __init__(self, name: str, nbytes: int, parts: int = 1) -> None:
        """Make the memory.

        Args:
            name: what it is for; one word.
            nbytes: size of a part; it is rounded up to whole pages.
            parts: how many workers there are.

        Raises:
            OSError: the process has no descriptor left, or the system no memory.
        """
        self._name = name
        self._part_bytes = -(-nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self.descriptor = os.memfd_create(f"vqserve-{name}")
        try:
            os.ftruncate(self.descriptor, parts * self._part_bytes)
            self._view = memoryview(mmap.mmap(self.descriptor, parts * self._part_bytes))
        except BaseException:
            os.close(self.descriptor)
            raise

    def part(self, number: int) -> memoryview:
        """Return the bytes of a worker, writable."""
        return self._view[number * self._part_bytes : (number + 1) * self._part_bytes]

    def environment(self, number: int) -> dict[str, str]:
        """Return the environment variable by which a worker finds its part with `inherited_part`."""
        return {_variable(self._name): f"{self.descriptor},{number * self._part_bytes},{self._part_bytes}"}


def inherited_part(name: str, environ: Mapping[str, str]) -> memoryview | None:
    """Return this worker's part of the memory of its parent; None: there is none.

    Args:
        name: of the memory, as the parent has it.
        environ: the environment of this process.
    """
    written = environ.get(_variable(name))
    if written is None:
        return None
    descriptor, start, nbytes = map(int, written.split(","))
    view = memoryview(mmap.mmap(descriptor, nbytes, offset=start))
    # The mapping needs it no longer, and this process's own children must not have it.
    os.close(descriptor)
    return view


def private_part(nbytes: int) -> memoryview:
    """Return such memory of a process without a parent."""
    return memoryview(mmap.mmap(-1, nbytes))


def _variable(name: str) -> str:
    return _VARIABLE + name.upper()
