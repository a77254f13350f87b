"""Subnormal numbers, where a process has switched them off: torch.set_flush_denormal, libraries compiled for speed.

They are switched off thread by thread. A thread begins with the setting of the one that starts it, so that torch's own
threads may have them off whatever this one does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


@contextmanager
def kept() -> Iterator[None]:
    """Switch subnormal numbers on for a while, on this thread."""
    if sys.float_info.min / 2 != 0.0:
        yield
        return
    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        torch.set_flush_denormal(True)


def widened(numbers: Tensor) -> Tensor:
    """Return float32 or float64 numbers as float64, exactly."""
    if numbers.dtype == torch.float64:
        return numbers
    return widen_into(torch.empty(numbers.shape, dtype=torch.float64, device=numbers.device), numbers)


def widen_into(wide: Tensor, numbers: Tensor) -> Tensor:
    """Copy float32 or float64 numbers to a float64 tensor, exactly, and return that."""
    if numbers.dtype == torch.float64 or numbers.device.type != "cpu":
        return wide.copy_(numbers)
    # Not by torch, whose threads may have subnormal numbers off: numpy stays on this one.
    with kept():
        np.copyto(wide.numpy(), numbers.detach().resolve_neg().numpy())
    return wide
