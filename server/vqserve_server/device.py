"""The device that serves codebooks: choice, streams, copies to and from it, and which of its errors are fatal."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from vqserve.errors import InvalidOption

# Characters of torch's reason: it adds pages of hints.
_LONGEST_REASON = 300


def select_device(device: str | torch.device) -> torch.device:
    """Return the device of a name, after a test computation on it.

    Args:
        device: "auto" (a CUDA device that works, else the CPU), "cpu", "cuda" or "cuda:i".

    Raises:
        InvalidOption: there is no such device, or it does not work.
    """
    if device == "auto":
        return _numbered(torch.device("cuda")) if why_no_cuda() is None else torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise InvalidOption(f"device must be auto, cpu, cuda or cuda:i, not {device!r}") from None
    if chosen.type not in {"cpu", "cuda"}:
        raise InvalidOption(f"device must be auto, cpu, cuda or cuda:i, not {str(device)!r}")
    if chosen.type == "cuda" and _failure(chosen) is not None:
        raise InvalidOption(f"device {str(device)!r} does not exist or does not work: torch finds {_seen()}")
    return _numbered(chosen)


def _numbered(device: torch.device) -> torch.device:
    # The device of "cuda" depends on the thread, so replace it by a number.
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def why_no_cuda() -> str | None:
    """Return why "auto" does not choose CUDA, in torch's words where it has some; None: it does."""
    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return "this torch is built without CUDA"
    return _failure(torch.device("cuda"))


def _failure(device: torch.device) -> str | None:
    """Return why a device does not work; None: it works."""
    # A driver or a GPU that this torch does not support fails only when something runs.
    try:
        is_right = bool((torch.ones(2, device=device) + 1).sum().item() == 4)
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__
    return None if is_right else "it computes wrong sums"


def _seen() -> str:
    count = torch.cuda.device_count()
    return f"{count} CUDA device{'' if count == 1 else 's'}"


def wait_for_stream(device: torch.device) -> None:
    """Wait until a device has finished the work of the calling thread's stream; does nothing on the CPU.

    On CUDA no stream waits for another, so one thread must wait before another reads its results.
    """
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Return a tensor of an array's values on a device; on the CPU it shares the array's memory where torch can.

    A copy from page-locked memory is asynchronous, in the order of the stream; ordinary memory has been read when this
    returns.
    """
    # torch warns if it shares read-only memory; a copy takes little time compared with the search.
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    return tensor if device.type == "cpu" else tensor.to(device, non_blocking=True)


def to_host(rows: Tensor) -> Tensor:
    """Return rows in host memory, after all work of the current stream."""
    if rows.device.type == "cpu":
        return rows
    if rows.device.type != "cuda":
        return rows.cpu()
    with torch.cuda.device(rows.device):
        # torch pools page-locked memory, which is slow to allocate but several times as fast to copy to.
        host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        host.copy_(rows, non_blocking=True)
        wait_for_stream(rows.device)
    return host


# After an illegal access or an ECC error every later call of the CUDA context fails, and only a new process helps.
# After an out-of-memory error the context still works.
_BROKEN: tuple[type[BaseException], ...] = tuple(
    kind for kind in (getattr(torch, "AcceleratorError", None), torch.cuda.CudaError) if kind is not None
)
_MARKS = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "cuBLAS error", "HIP error", "device-side assert")
# Page-locked memory, memory of a CUDA library, and memory of the host in an error of torch.
_NO_MEMORY_MARKS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception from a tokenizer means that less work at once might have succeeded."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _NO_MEMORY_MARKS)


def is_device_failure(error: BaseException) -> bool:
    """Return whether an exception from a tokenizer means that the device cannot be used any more."""
    if is_out_of_memory(error):
        return False
    if isinstance(error, _BROKEN):
        return True
    # CUDA libraries, and torch before AcceleratorError existed, raise a RuntimeError.
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _MARKS)


def reserved_bytes(device: torch.device) -> int | None:
    """Return how much memory of a device this process has; None: it is that of the host."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else None


def free_cached_memory(device: torch.device) -> None:
    """Give back the memory of a device that torch keeps for later; does nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


class DeviceStreams:
    """The CUDA streams of one thread: one for each device."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def on(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the thread's work for a device goes to its own stream; none on the CPU."""
        if device.type != "cuda":
            return contextlib.nullcontext()
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(stream)
