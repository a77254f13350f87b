"""A searcher that is made when it is first needed."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from vqserve_server.device import wait_for_stream
from vqserve_server.search.searcher import Searcher


class OnDemand:
    """Makes a searcher once, for whichever thread asks first, and gives it to all."""

    def __init__(self, make: Callable[[], Searcher], device: torch.device) -> None:
        """Take what makes the searcher, and the device that its codebook is on."""
        self._make = make
        self._device = device
        self._lock = threading.Lock()
        self._searcher: Searcher | None = None

    def __call__(self) -> Searcher:
        """Return the searcher."""
        with self._lock:
            if self._searcher is None:
                searcher = self._make()
                # Before other threads have its tables.
                wait_for_stream(self._device)
                self._searcher = searcher
            return self._searcher
