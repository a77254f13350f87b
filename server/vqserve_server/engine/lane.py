"""What one device thread has for itself."""

from __future__ import annotations

import contextlib

import torch

from vqserve_server.engine.staging import Staging


class Lane:
    """What one device thread has for itself: memory, and on CUDA a stream."""

    def __init__(self) -> None:
        self.staging = Staging()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def on(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the device works for this thread alone."""
        if device.type != "cuda":
            return contextlib.nullcontext()
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(stream)
