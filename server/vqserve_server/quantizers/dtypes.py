"""Which precision things are computed in."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call


def widened(dtype: torch.dtype) -> torch.dtype:
    """Return the type that search, loss and sums use: float32 for the half types, else the type itself."""
    return torch.promote_types(dtype, torch.float32)


def widen(tensor: Tensor) -> Tensor:
    """Return a tensor in at least float32, detached: the numbers as stored, which widening does not change."""
    return tensor.detach().to(widened(tensor.dtype))


def autocast_off(device: torch.device) -> torch.autocast:
    """Return a context in which autocast narrows nothing: a search in half precision would give other tokens."""
    return torch.autocast(device.type, enabled=False)


def apply_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """Return layer(x) in torch's promoted type of x and the layer's weight; under autocast, in autocast's.

    Outside autocast torch's layers refuse an input of another type than their own.
    """
    weight = layer.get_parameter("weight")
    dtype = torch.promote_types(x.dtype, weight.dtype)
    x = x.to(dtype)
    # Autocast leaves float64 inputs alone, and with them the mismatch.
    narrows = torch.is_autocast_enabled(x.device.type) and dtype != torch.float64
    if weight.dtype == dtype or narrows:
        y: Tensor = layer(x)
    else:
        y = functional_call(layer, {name: value.to(dtype) for name, value in layer.named_parameters()}, (x,))
    return y
