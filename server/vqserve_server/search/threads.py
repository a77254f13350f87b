"""How many threads one search on the CPU uses."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path


def search_threads() -> int:
    """Return what torch uses, where it is imported; else `OMP_NUM_THREADS`, or one for each core, as torch would."""
    used = getattr(sys.modules.get("torch"), "get_num_threads", None)
    if used is not None:
        count: int = used()
        return count
    return _own_threads()


@functools.cache
def _own_threads() -> int:
    # A list has a number for each level of nested regions.
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if given.isdecimal() and int(given) > 0:
        return int(given)
    cpus = os.sched_getaffinity(0)
    return max(1, len({_core(cpu) for cpu in cpus}))


def _core(cpu: int) -> str:
    """Return what the CPUs of one core have in common, and no others."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    except OSError:
        return str(cpu)
