"""A grid of values prepared for serving: boundaries, values and weights of digits, channel by channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqserve.errors import CodebookError, InvalidOption
from vqserve.types import OutputName
from vqserve.validation import check_output
from vqserve_server.quantizers.inference.base import FrozenQuantizer
from vqserve_server.quantizers.inference.served import probe_ids
from vqserve_server.quantizers.projections import Projection, largest_projected, on_device, project
from vqserve_server.quantizers.tensors import autocast_off
from vqserve_server.search import available
from vqserve_server.search.denormals import to_float64
from vqserve_server.search.rounding import affine

# Up to so many boundaries of a channel, comparing with each of them is faster than a binary search.
_FEW_BOUNDARIES = 8


@dataclass(frozen=True)
class Channel:
    """The quantization of one channel: its digit is the number of boundaries below its value.

    Attributes:
        boundaries: (L - 1,) float64, ascending; an infinite one is never, or always, below.
        values: (L,) float32, what each digit is decoded as.
        weight: what the digit counts in the index.
    """

    boundaries: npt.NDArray[np.float64]
    values: npt.NDArray[np.float32]
    weight: int


@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenScalar(FrozenQuantizer):
    """Digits by comparison with exact boundaries: nothing is computed in which rounding could matter."""

    # (D, L - 1) float64, infinite beyond a channel's own; (D, L); (D,) int64 each.
    _boundaries: Tensor
    _values: Tensor
    _weights: Tensor
    _levels: Tensor
    _projection: Projection | None
    _output_projection: Projection | None

    @classmethod
    def of(
        cls,
        channels: Sequence[Channel],
        *,
        device: torch.device,
        search: str,
        projections: tuple[Projection | None, Projection | None],
        **sizes: Any,
    ) -> Self:
        """Return the grid of these channels.

        Args:
            channels: D of them.
            device: where to serve it.
            search: checked, though nothing is searched.
            projections: in and out.
            **sizes: the other attributes of `FrozenQuantizer`.

        Raises:
            InvalidOption: the search backend does not run on the device.
            CodebookError: the output projection leaves float32's range.
        """
        if search not in ("auto", *available(device)):
            raise InvalidOption(
                f"no search backend {search!r} on {device.type}: choose one of auto, {available(device)}"
            )
        longest = max(len(channel.values) for channel in channels)
        boundaries = np.full((len(channels), longest - 1), np.inf)
        values = np.zeros((len(channels), longest), np.float32)
        for row, channel in enumerate(channels):
            boundaries[row, : len(channel.boundaries)] = channel.boundaries
            values[row, : len(channel.values)] = channel.values
        largest = torch.from_numpy(np.abs(values).max(axis=1)).double()
        inner, outer = projections
        if not bool((largest_projected(largest, outer) < torch.finfo(torch.float32).max).all()):
            raise CodebookError("the output projection may take codes beyond float32's range")
        return cls(
            device=device,
            _boundaries=torch.from_numpy(boundaries).to(device),
            _values=torch.from_numpy(values).to(device),
            _weights=torch.tensor([channel.weight for channel in channels], device=device),
            _levels=torch.tensor([len(channel.values) for channel in channels], device=device),
            _projection=on_device(inner, device),
            _output_projection=on_device(outer, device),
            **sizes,
        )

    @property
    def search_backend(self) -> str:
        """No search."""
        return "none"

    @torch.no_grad()
    def encode_rows(self, rows: Tensor, *, num_quantizers: int | None = None) -> Tensor:
        """Return the index (n,) of every row; see `FrozenQuantizer.encode_rows`."""
        with autocast_off(self.device):
            rows = project(rows, self._projection)
        return self.indices_of(self.digits(rows))

    def digits(self, rows: Tensor) -> Tensor:
        """Return the digits (D, n) int64 of channels (n, D) float32 or float64, behind any projection."""
        numbers, boundaries = _ordered(to_float64(rows).T.contiguous()), _ordered(self._boundaries)
        if boundaries.shape[1] > _FEW_BOUNDARIES:
            return torch.searchsorted(boundaries, numbers)
        digits = torch.zeros(numbers.shape, dtype=torch.int32, device=numbers.device)
        for boundary in boundaries.unbind(dim=1):
            digits += numbers > boundary[:, None]
        return digits.long()

    def indices_of(self, digits: Tensor) -> Tensor:
        """Return the indices (n,) of digits (D, n)."""
        return (digits * self._weights[:, None]).sum(dim=0)

    def values_of(self, digits: Tensor) -> Tensor:
        """Return the values (n, D) float32 of digits (D, n), before any projection."""
        return self._values.gather(1, digits).T.contiguous()

    def largest_values(self) -> Tensor:
        """Return the greatest magnitude (D,) float64 of every channel's values."""
        return self._values.abs().amax(dim=1).double()

    @torch.no_grad()
    def check_itself(self) -> None:
        """Self-test: encode, for a sample of the codes, numbers between the boundaries of their digits.

        Raises:
            CodebookError: another index came out.
        """
        probes = torch.from_numpy(probe_ids(self.num_codes)).to(self.device)
        digits = probes[:, None] // self._weights % self._levels
        edge = torch.full((self.code_dim, 1), torch.inf, dtype=torch.float64, device=self.device)
        channels = torch.arange(self.code_dim, device=self.device)
        below = torch.cat([-edge, self._boundaries], dim=1)[channels, digits]
        above = torch.cat([self._boundaries, edge], dim=1)[channels, digits]
        # A number's digit counts the boundaries below it, so the boundary above a digit is the digit's own last number.
        rows = torch.where(above.isinf(), torch.nextafter(below, above), above)
        # Between equal boundaries there is no number.
        is_right = (self.indices_of(self.digits(rows)) == probes) | (below >= above).any(dim=1)
        if not bool(is_right.all()):
            raise CodebookError(f"index {int(probes[~is_right][0])} is not found between its own boundaries")

    @torch.no_grad()
    def decode_rows(
        self, indices: Tensor, *, output: OutputName = "latents", dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return the row of every index (n,); see `FrozenQuantizer.decode_rows`."""
        check_output(output)
        rows = self.values_of(indices // self._weights[:, None] % self._levels[:, None])
        if output == "latents" and self._output_projection is not None:
            with autocast_off(self.device):
                rows = affine(rows, *self._output_projection)
        return rows.to(self.weight_dtype)


def _ordered(numbers: Tensor) -> Tensor:
    """Return int64 in the order of float64 numbers, with -0.0 just below 0.0.

    Unlike numbers, integers are compared exactly also where the processor takes denormals for zero.
    """
    bits = numbers.view(torch.int64)
    return bits ^ ((bits >> 63) & torch.iinfo(torch.int64).max)
