"""What this process is among others, and has of the system: memory that it gives back, files that it may open."""

from __future__ import annotations

import ctypes
import logging
import os
import resource
from collections.abc import Mapping

from vqserve_server.event_log import ONCE, event

# Environment variable with the number of a worker; it is not a setting for users.
WORKER_VARIABLE = "_VQSERVE_WORKER"
# Descriptors beside those of connections: the process's own files, and a reload's.
_OWN_DESCRIPTORS = 256

logger = logging.getLogger(__name__)


def worker_number(environ: Mapping[str, str]) -> int | None:
    """Return the number of this process among several that share a port; None if it is no worker."""
    number = environ.get(WORKER_VARIABLE)
    return None if number is None else int(number)


def num_cores() -> int:
    """Return on how many cores this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def trim_memory() -> None:
    """Return free memory to the system.

    glibc keeps what was freed in the middle of its heaps, for good: after a burst of large messages that is gigabytes.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def allow_connections(count: int) -> None:
    """Raise the limit of open files, as far as the system allows, so that it has room for so many connections.

    The usual soft limit of 1024 is for programs that call select.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OWN_DESCRIPTORS
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    got = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (got, hard))
    if got < wanted:
        text = "lower --max-connections, or raise the limit (ulimit -n, LimitNOFILE=)"
        logger.warning(event("open_files_limited", limit=got, wanted=wanted, hint=text), extra=ONCE)
