"""What tells that a file has changed, without reading it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

# Resolution of the times of some file systems: a file that changed this recently may change again unnoticed.
CLOCK_S = 2.0

# Device, inode, size, times of change in nanoseconds: they stay the same while a file does not change.
Stamp = tuple[int, ...]


def stamp_of(path: Path) -> Stamp | None:
    """Return the stamp of a file; None: the system does not give it.

    Links are followed: a mounted Kubernetes Secret changes by the exchange of a link to its folder.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def last_change_s(stamps: Iterable[Stamp | None]) -> float:
    """Return when the last of some files changed, in time.time() seconds; 0: there is none."""
    return max((max(stamp[-2:]) for stamp in stamps if stamp is not None), default=0) / 1e9
