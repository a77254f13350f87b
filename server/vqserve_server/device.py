"""The device that serves codebooks: choice, streams, copies to and from it, and which of its errors are fatal.

torch is imported only for a device that needs it, or where a CUDA driver could make "auto" choose one.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy.typing as npt

from vqserve.errors import InvalidOption

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Characters of torch's reason: it adds pages of hints.
_LONGEST_REASON = 300
_NAME = re.compile(r"(cpu|cuda)(:(0|[1-9][0-9]*))?")


class Device(str):
    """The name of a device, such as "cpu" or "cuda:0", which torch takes in place of a `torch.device`."""

    __slots__ = ()

    @property
    def type(self) -> str:
        """Its kind, "cpu" or "cuda"."""
        return self.partition(":")[0]


AnyDevice: TypeAlias = "Device | torch.device"
CPU = Device("cpu")


def select_device(device: str | torch.device) -> Device:
    """Return the device of a name, after a test computation on it.

    Args:
        device: "auto" (a CUDA device that works, else the CPU), "cpu", "cuda" or "cuda:i".

    Raises:
        InvalidOption: there is no such device, or it does not work.
    """
    if device == "auto":
        return _numbered(Device("cuda")) if why_no_cuda() is None else CPU
    name = str(device)
    if not _NAME.fullmatch(name):
        raise InvalidOption(f"device must be auto, cpu, cuda or cuda:i, not {name!r}")
    chosen = Device(name)
    if chosen.type == "cuda" and _failure(chosen) is not None:
        raise InvalidOption(f"device {name!r} does not exist or does not work: torch finds {_seen()}")
    return _numbered(chosen)


def _numbered(device: Device) -> Device:
    # The device of "cuda" depends on the thread, so replace it by a number.
    if device == "cuda":
        import torch  # noqa: PLC0415

        return Device(f"cuda:{torch.cuda.current_device()}")
    return device


def why_no_cuda() -> str | None:
    """Return why "auto" does not choose CUDA, in torch's words where it has some; None: it does."""
    if not _has_driver():
        return "there is no driver of a GPU: libcuda.so.1 cannot be loaded"
    import torch  # noqa: PLC0415

    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return "this torch is built without CUDA"
    return _failure(Device("cuda"))


def _has_driver() -> bool:
    """Return whether a driver is installed that torch's CUDA could use: NVIDIA's, or AMD's."""
    if Path("/dev/kfd").exists():
        return True
    try:
        # As CUDA finds it. Loading it starts nothing.
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _failure(device: Device) -> str | None:
    """Return why a device does not work; None: it works."""
    import torch  # noqa: PLC0415

    # A driver or a GPU that this torch does not support fails only when something runs.
    try:
        is_right = bool((torch.ones(2, device=device) + 1).sum().item() == 4)
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__
    return None if is_right else "it computes wrong sums"


def _seen() -> str:
    import torch  # noqa: PLC0415

    count = torch.cuda.device_count()
    return f"{count} CUDA device{'' if count == 1 else 's'}"


def wait_for_stream(device: AnyDevice) -> None:
    """Wait until a device has finished the work of the calling thread's stream; does nothing on the CPU.

    On CUDA no stream waits for another, so one thread must wait before another reads its results.
    """
    if device.type == "cuda":
        import torch  # noqa: PLC0415

        torch.cuda.current_stream(device).synchronize()


def to_device(array: npt.NDArray[Any], device: AnyDevice) -> Tensor:
    """Return a tensor of an array's values on a device; on the CPU it shares the array's memory where torch can.

    A copy from page-locked memory is asynchronous, in the order of the stream; ordinary memory has been read when this
    returns.
    """
    import torch  # noqa: PLC0415

    # torch warns if it shares read-only memory; a copy takes little time compared with the search.
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    return tensor if device.type == "cpu" else tensor.to(device, non_blocking=True)


def to_host(rows: Tensor) -> Tensor:
    """Return rows in host memory, after all work of the current stream."""
    if rows.device.type == "cpu":
        return rows
    if rows.device.type != "cuda":
        return rows.cpu()
    import torch  # noqa: PLC0415

    with torch.cuda.device(rows.device):
        # torch pools page-locked memory, which is slow to allocate but several times as fast to copy to.
        host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        host.copy_(rows, non_blocking=True)
        wait_for_stream(rows.device)
    return host


_MARKS = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "cuBLAS error", "HIP error", "device-side assert")
# Page-locked memory, memory of a CUDA library, and memory of the host in an error of torch.
_NO_MEMORY_MARKS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception from a tokenizer means that less work at once might have succeeded."""
    if isinstance(error, (MemoryError, *_classes("OutOfMemoryError"))):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _NO_MEMORY_MARKS)


def is_device_failure(error: BaseException) -> bool:
    """Return whether an exception from a tokenizer means that the device cannot be used any more."""
    if is_out_of_memory(error):
        return False
    # After an illegal access or an ECC error every later call of the CUDA context fails, and only a new process helps.
    # After an out-of-memory error the context still works.
    if isinstance(error, _classes("AcceleratorError", "CudaError")):
        return True
    # CUDA libraries, and torch before AcceleratorError existed, raise a RuntimeError.
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _MARKS)


def _classes(*names: str) -> tuple[type[BaseException], ...]:
    """Return torch's classes of errors with these names, as far as it has them; none where it is not imported."""
    torch = sys.modules.get("torch")
    modules = (torch, getattr(torch, "cuda", None))
    found = (getattr(module, name, None) for module in modules for name in names)
    return tuple(kind for kind in found if kind is not None)


def reserved_bytes(device: AnyDevice) -> int | None:
    """Return how much memory of a device this process has; None: it is that of the host."""
    if device.type != "cuda":
        return None
    import torch  # noqa: PLC0415

    return torch.cuda.memory_reserved(device)


def free_cached_memory(device: AnyDevice) -> None:
    """Give back the memory of a device that torch keeps for later; does nothing on the CPU."""
    if device.type == "cuda":
        import torch  # noqa: PLC0415

        torch.cuda.empty_cache()


class DeviceStreams:
    """The CUDA streams of one thread: one for each device."""

    def __init__(self) -> None:
        self._streams: dict[AnyDevice, torch.cuda.Stream] = {}

    def on(self, device: AnyDevice) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the thread's work for a device goes to its own stream; none on the CPU."""
        if device.type != "cuda":
            return contextlib.nullcontext()
        import torch  # noqa: PLC0415

        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(stream)
