"""What a thread has given a CUDA device to do. On CUDA no stream waits for another's work, so that threads have to."""

from __future__ import annotations

import torch


def wait_for_stream(device: torch.device) -> None:
    """Wait until a device has done what the calling thread's stream gave it; the CPU has when the thread goes on."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
