"""Faults of a device, put into real servers on a CPU while they serve.

The server's processes import `faulty_device/sitecustomize.py`; each looks for its fault, a file in a folder, before
every computation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

FaultName = Literal[
    "hang",  # a computation does not return
    "hold_the_interpreter",  # nor does any other thread run
    "hang_transport",  # the thread that talks to gRPC gets stuck at a health check
    "hang_loop",  # the event loop gets stuck at a SIGHUP
    "sticky",  # every computation fails from now on, as after an illegal access
    "failing",  # every computation fails from now on, with an unexpected error
    "garbage",  # every computation has wrong results from now on
    "out_of_memory",  # above a number of rows
    "slow",  # every computation takes a number of seconds more
]
_HOOK = Path(__file__).parent / "faulty_device"


class Faults:
    """The faults of the processes of one server."""

    def __init__(self, folder: Path) -> None:
        """Use an empty folder."""
        self._folder = folder
        self.environ = {"PYTHONPATH": str(_HOOK), "FAULTY_DEVICE": str(folder)}

    def put(self, fault: FaultName, number: float = 0, *, worker: int = 0) -> None:
        """Give a process a fault; one that it has, and that has not happened, is replaced.

        Args:
            fault: what happens. "out_of_memory" and "slow" happen until `clear`, others once: not in the next process.
            number: rows for "out_of_memory", seconds for "slow".
            worker: number of the process.
        """
        written = self._folder / f"{worker}.new"
        written.write_text(f"{fault} {number}")
        written.rename(self._folder / str(worker))

    def has_happened(self, worker: int = 0) -> bool:
        """Whether a fault has happened in a process."""
        return (self._folder / f"{worker}.happened").exists()

    def clear(self, worker: int = 0) -> None:
        """Take the fault away."""
        (self._folder / str(worker)).unlink(missing_ok=True)
