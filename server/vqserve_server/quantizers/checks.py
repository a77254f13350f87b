"""What a caller's tensors must satisfy, with errors that name the offender."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from vqserve.validation import not_an_index, not_finite, not_indices
from vqserve_server.errors import InvalidOption

_INTEGER_DTYPES = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)


def check_finite(z: Tensor) -> None:
    """Refuse NaN and infinity in latents of any shape.

    Raises:
        NonFiniteLatents: names the first one's position: "latents[0, 3, 5, 7] is nan".
    """
    finite = torch.isfinite(z)
    if not bool(finite.all()):
        position = torch.nonzero(~finite)[0].tolist()
        raise not_finite(position, float(z[tuple(position)]))


def check_integers(indices: Tensor) -> None:
    """Refuse what is not an integer tensor.

    Raises:
        InvalidDtype: for floating point, complex and bool.
    """
    if indices.dtype not in _INTEGER_DTYPES:
        raise not_indices(indices.dtype)


def checked_indices(indices: Tensor, bound: int) -> Tensor:
    """Return indices of any shape and integer type as int64, all within [0, bound).

    Raises:
        InvalidDtype: the tensor does not hold integers.
        IndexOutOfRange: names the first offender's position, its value and the range.
    """
    check_integers(indices)
    # A uint64 beyond int64 turns negative here, so that it is refused too, and named by its own value.
    wide = indices.to(torch.int64)
    if not wide.numel():
        return wide
    low, high = torch.aminmax(wide)
    if low < 0 or high >= bound:
        position = torch.nonzero((wide < 0) | (wide >= bound))[0].tolist()
        raise not_an_index(position, int(indices[tuple(position)].item()), bound)
    return wide


def check_size(name: str, value: object) -> None:
    """Refuse a size of a module that is not a positive integer.

    Raises:
        InvalidOption: names the argument.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise InvalidOption(f"{{option}} must be a positive integer, not {value!r:.40}", option=name)
