"""The device that codebooks are served from: which one, its streams, rows there and back, and whether it is lost."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from vqserve_server.errors import InvalidOption


def select_device(device: str | torch.device) -> torch.device:
    """Return the device of that name, tried.

    Args:
        device: "auto" (a CUDA device that works, else the CPU), "cpu", "cuda" or "cuda:i".

    Raises:
        InvalidOption: there is no such device, or it does not work.
    """
    if device == "auto":
        cuda = torch.device("cuda")
        return _numbered(cuda) if torch.cuda.is_available() and _works(cuda) else torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise InvalidOption(f"device must be auto, cpu, cuda or cuda:i, not {device!r}") from None
    if chosen.type not in {"cpu", "cuda"}:
        raise InvalidOption(f"device must be auto, cpu, cuda or cuda:i, not {str(device)!r}")
    if chosen.type == "cuda" and not _works(chosen):
        raise InvalidOption(f"device {str(device)!r} is not there or does not work: torch sees {_seen()}")
    return _numbered(chosen)


def _numbered(device: torch.device) -> torch.device:
    # "cuda" means another device to a thread that has chosen one.
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _works(device: torch.device) -> bool:
    # A driver too old for this torch, or a card that it was not built for, shows only when something runs.
    try:
        return bool((torch.ones(2, device=device) + 1).sum().item() == 4)
    except (RuntimeError, AssertionError):
        return False


def _seen() -> str:
    count = torch.cuda.device_count()
    return f"{count} CUDA device{'' if count == 1 else 's'}"


def wait_for_stream(device: torch.device) -> None:
    """Wait until a device has done what the calling thread's stream gave it; the CPU has when the thread goes on."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


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


class DeviceStreams:
    """The CUDA streams of one thread, one a device."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def on(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the device works for this thread alone."""
        if device.type != "cuda":
            return contextlib.nullcontext()
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(stream)
