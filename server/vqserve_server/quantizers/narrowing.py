"""Rounding to a narrower floating-point type once, also where the hardware's way is to round twice."""

from __future__ import annotations

import torch
from torch import Tensor


def narrow(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values in `dtype`, each rounded once to nearest even; what leaves its range becomes an infinity.

    Args:
        values: float32 or float64, finite.
        dtype: a type of latents.
    """
    if values.dtype != torch.float64 or dtype.itemsize > 2:
        return values.to(dtype)
    # torch goes from float64 to half precision by way of float32, and two roundings to nearest can end next to the
    # nearest. Rounding to odd on the way cannot: it keeps what was cut off in the last bit (Boldo and Melquiond,
    # "When double rounding is odd", 2005). float32 has the two bits to spare that this needs.
    nearest = values.to(torch.float32)
    back = nearest.to(torch.float64)
    truncated = nearest.view(torch.int32) - (back.abs() > values.abs()).to(torch.int32)
    odd = truncated | (back != values).to(torch.int32)
    return odd.view(torch.float32).to(dtype)
