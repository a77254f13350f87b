"""The tensors that quantizers are given: checks of their shapes and values, their rows, and changes of precision."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from vqserve.dtypes import LATENTS, of_torch, round_to_odd
from vqserve.errors import InvalidOption, InvalidShape
from vqserve.layout import Layout, grid_shape, num_rows, resolve_layout
from vqserve.validation import check_channels, not_an_index, not_finite, not_indices, not_latents
from vqserve_server import rows as token_rows

# The types of latents, by how they are stored.
TORCH_DTYPES: dict[np.dtype[Any], torch.dtype] = {dtype.storage: getattr(torch, dtype.name) for dtype in LATENTS}
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
    """Reject NaN and infinity in latents of any shape.

    Raises:
        NonFiniteLatents: names the first one's position: "latents[0, 3, 5, 7] is nan".
    """
    finite = torch.isfinite(z)
    if not bool(finite.all()):
        position = torch.nonzero(~finite)[0].tolist()
        raise not_finite(position, float(z[tuple(position)]))


def check_integers(indices: Tensor) -> None:
    """Reject tensors that do not hold integers.

    Raises:
        InvalidDtype: for floating point, complex and bool.
    """
    if indices.dtype not in _INTEGER_DTYPES:
        raise not_indices(indices.dtype)


def checked_indices(indices: Tensor, bound: int, stage_sizes: Sequence[int] = (), axis: int = -1) -> Tensor:
    """Return indices of any shape and integer type as int64, all within [0, bound), or those of their stages.

    Args:
        indices: the indices.
        bound: exclusive upper bound; of several stages, the largest.
        stage_sizes: exclusive upper bound of each stage, where these differ.
        axis: axis of a token's indices, with as many elements as there are stages or fewer.

    Raises:
        InvalidDtype: the tensor does not hold integers.
        IndexOutOfRange: names the first offender's position, its value and the range.
    """
    check_integers(indices)
    # A uint64 beyond int64 turns negative here, so it is out of range too; the error names its original value.
    wide = indices.to(torch.int64)
    if not wide.numel():
        return wide
    low, high = torch.aminmax(wide)
    if low >= 0 and high < min(stage_sizes, default=bound):
        return wide
    shape = [1] * wide.ndim
    if stage_sizes:
        shape[axis] = wide.shape[axis]
    bounds = torch.tensor(stage_sizes[: wide.shape[axis]] if stage_sizes else [bound], device=wide.device)
    outside = torch.nonzero((wide < 0) | (wide >= bounds.reshape(shape)))
    if len(outside):
        position = outside[0].tolist()
        stage = position[axis] if stage_sizes else None
        size = bound if stage is None else stage_sizes[stage]
        raise not_an_index(position, int(indices[tuple(position)].item()), size, stage=stage)
    return wide


def check_size(name: str, value: object) -> None:
    """Reject a size of a module that is not a positive integer.

    Raises:
        InvalidOption: names the argument.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise InvalidOption(f"{{option}} must be a positive integer, not {value!r:.40}", option=name)


def layout_of(rank: int, default: Layout | None = None) -> Layout:
    """Return the layout of latents of 2 to 5 axes: the default from 3 axes up, and last for 2.

    Args:
        rank: axes.
        default: a quantizer's `layout`; None: channels first for 4 and 5 axes, last for 3.

    Raises:
        InvalidShape: for any other rank.
    """
    return resolve_layout(rank, None, default)


def grid_of(z: Tensor, channels: int, default: Layout | None = None) -> tuple[int, ...]:
    """Return the shape of the tokens of latents.

    Args:
        z: (b, C, h, w), (b, C, t, h, w), (b, s, C) or (n, C), or as `default` says; floating point.
        channels: the C that is expected.
        default: as in `layout_of`.

    Raises:
        InvalidDtype: z is not of a type of latents.
        InvalidShape: another rank, or another channel count.
    """
    shape = tuple(z.shape)
    if of_torch(z.dtype) not in LATENTS:
        raise not_latents(z.dtype)
    layout = layout_of(z.ndim, default)
    check_channels(shape, layout, channels)
    return grid_shape(shape, layout)


def to_rows(z: Tensor, default: Layout | None = None) -> Tensor:
    """Return latents of 2 to 5 axes as rows (N, C), in the order of the flattened grid; `default` as in `layout_of`."""
    return token_rows.to_rows(z, layout_of(z.ndim, default))


def from_rows(rows: Tensor, grid: Sequence[int], default: Layout | None = None) -> Tensor:
    """Return rows (N, C) as contiguous latents over a grid of 1 to 4 axes: the inverse of `to_rows`."""
    return token_rows.from_rows(rows, grid, layout_of(len(grid) + 1, default))


def grid_of_entries(shape: Sequence[int], *, width: int, count: int) -> tuple[int, ...]:
    """Return the grid of code rows whose channel-last shape a caller gives.

    Args:
        shape: 2 to 5 axes, the last of them the code rows' width.
        width: of a code row.
        count: the number of indices.

    Raises:
        InvalidShape: the shape does not end in the width, or holds another number of tokens.
    """
    shape = tuple(shape)
    tokens = num_rows(shape[:-1]) if min(shape, default=-1) >= 0 else -1
    if not 2 <= len(shape) <= 5 or shape[-1] != width or tokens != count:
        raise InvalidShape(
            f"entries of shape {shape} do not fit {count} indices and codes of width {width}: "
            "a shape is channel-last and has 2 to 5 axes"
        )
    return shape[:-1]


def check_not_empty(grid: Sequence[int]) -> None:
    """Reject a batch without tokens, whose means would be NaN.

    Raises:
        InvalidShape: the grid holds no token.
    """
    if num_rows(grid) == 0:
        raise InvalidShape(f"a grid of shape {tuple(grid)} holds no tokens: forward needs at least one")


def widened(dtype: torch.dtype) -> torch.dtype:
    """Return the type that search, loss and sums use: float32 for the half types, else the type itself."""
    return torch.promote_types(dtype, torch.float32)


def widen(tensor: Tensor) -> Tensor:
    """Return a tensor in at least float32, detached: the numbers as stored, which widening does not change."""
    return tensor.detach().to(widened(tensor.dtype))


_AS_IT_IS = contextlib.nullcontext()


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which autocast narrows nothing: a search in half precision would give other tokens."""
    # Entering a context of torch takes as long as a small search.
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else _AS_IT_IS


def apply_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """Return layer(x) in torch's promoted type of x and the layer's weight; under autocast, in autocast's.

    Outside autocast an input of another type than the layer's own is an error in torch.
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


def narrow(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values in `dtype`, each rounded once to nearest even; what leaves its range becomes an infinity.

    Args:
        values: float32 or float64, finite.
        dtype: a type of latents.
    """
    if values.dtype != torch.float64 or dtype.itemsize > 2:
        return values.to(dtype)
    # torch goes from float64 to half precision by way of float32, to nearest twice.
    odd: Tensor = round_to_odd(values.to(torch.float32), values, torch)
    return odd.to(dtype)


def is_finite(values: Tensor) -> Tensor:
    """Return where values are finite, bool of their shape; of 8-bit types too, on which torch does not compute."""
    return torch.isfinite(values if values.itemsize > 1 else values.float())


def are_finite(rows: Tensor) -> Tensor:
    """Return where all numbers of a row are finite: bool (n,) of rows (n, width).

    A codebook may be gigabytes: the least and the greatest number of a row are NaN or infinite if any is, and need no
    array of the size of the rows.
    """
    # torch does not compute on 8-bit types.
    wide = rows if rows.itemsize > 1 else rows.float()
    return torch.isfinite(wide.amin(dim=1)) & torch.isfinite(wide.amax(dim=1))


def are_the_same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are the same memory, read the same way."""
    return a.dtype == b.dtype and a.data_ptr() == b.data_ptr() and (a.shape, a.stride()) == (b.shape, b.stride())
