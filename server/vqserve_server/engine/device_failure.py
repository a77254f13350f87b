"""Which exceptions mean that the device is lost to this process."""

from __future__ import annotations

import torch

# A CUDA context that has seen an illegal access or an ECC error fails every later call: only a new process helps.
# Memory that ran out is not of that kind.
_BROKEN: tuple[type[BaseException], ...] = tuple(
    kind for kind in (getattr(torch, "AcceleratorError", None), torch.cuda.CudaError) if kind is not None
)
_MARKS = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "cuBLAS error", "HIP error", "device-side assert")


def is_device_failure(error: BaseException) -> bool:
    """Return whether an exception from a tokenizer tells of a device that cannot be used any more."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, _BROKEN):
        return True
    # Libraries around torch, and torch before AcceleratorError, raise a bare RuntimeError.
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _MARKS)
