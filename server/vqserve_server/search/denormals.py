"""Exact results although the process flushes denormal (subnormal) numbers to zero.

A call of torch.set_flush_denormal, or a library that was compiled for speed, can turn flush-to-zero on. The setting
belongs to a thread, and a new thread inherits it from the thread that starts it. So torch's own threads may flush
denormals although the calling thread does not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def denormals_enabled() -> Iterator[None]:
    """Turn flush-to-zero off for this thread inside the `with`, or inside the decorated function."""
    if sys.float_info.min / 2 != 0.0:
        yield
        return
    # It changes the processor's setting, whoever made it.
    import torch  # noqa: PLC0415

    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        torch.set_flush_denormal(True)


def to_float64(numbers: Tensor) -> Tensor:
    """Return float32 or float64 numbers as float64, exactly."""
    import torch  # noqa: PLC0415

    if numbers.dtype == torch.float64:
        return numbers
    return copy_as_float64(torch.empty(numbers.shape, dtype=torch.float64, device=numbers.device), numbers)


def copy_as_float64(wide: Tensor, numbers: Tensor) -> Tensor:
    """Copy float32 or float64 numbers into a float64 tensor, exactly, and return that tensor."""
    if numbers.dtype == wide.dtype or numbers.device.type != "cpu":
        return wide.copy_(numbers)
    # torch would copy on its own threads, which may flush denormals; numpy copies on this thread.
    with denormals_enabled():
        np.copyto(wide.numpy(), numbers.detach().resolve_neg().numpy())
    return wide
