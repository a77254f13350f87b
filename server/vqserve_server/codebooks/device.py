"""The device that a codebook is served from."""

from __future__ import annotations

import torch

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
