"""The processes of a server with several workers."""

from __future__ import annotations

from pathlib import Path

from vqserve_server.process import WORKER_VARIABLE


def children(parent: int) -> dict[int, int]:
    """The workers of a process: their numbers and process ids."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) != parent:
                continue
            environ = dict(
                entry.split("=", 1) for entry in (stat.parent / "environ").read_text().split("\0") if "=" in entry
            )
        except (OSError, ProcessLookupError):
            continue
        if WORKER_VARIABLE in environ:
            found[int(environ[WORKER_VARIABLE])] = int(stat.parent.name)
    return found
