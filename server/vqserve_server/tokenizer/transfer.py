"""Rows to a device and back, waiting once: for what comes back."""

from __future__ import annotations

import torch
from torch import Tensor

from vqserve_server.cuda_stream import wait_for_stream


def to_device(rows: Tensor, device: torch.device) -> Tensor:
    """Return rows on a device; from page-locked memory they may still be on their way, in the order of the stream.

    What is read from ordinary memory has been read when this returns.
    """
    return rows.to(device, non_blocking=True)


def to_host(rows: Tensor) -> Tensor:
    """Return rows in the memory of the host, when all that the current stream was given is done."""
    if rows.device.type != "cuda":
        return rows.cpu()
    with torch.cuda.device(rows.device):
        # Of a pool of torch's: page-locked memory is slow to come by, and several times as fast to copy to.
        host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        host.copy_(rows, non_blocking=True)
        wait_for_stream(rows.device)
    return host
