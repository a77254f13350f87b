"""Finite scalar quantization: every channel is bounded and rounded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import ClassVar, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqserve_server.errors import InvalidOption
from vqserve_server.quantizers.arguments import (
    LAYOUT,
    MAX_VOCABULARY,
    PROJECTIONS,
    Argument,
    ArgumentError,
    choice,
    served,
)
from vqserve_server.quantizers.frozen_scalar import Channel
from vqserve_server.quantizers.fsq_boundaries import EPS, Bound, boundaries
from vqserve_server.quantizers.quantizer import CodeSpace
from vqserve_server.quantizers.scalar import ScalarQuantizer

BOUNDS: tuple[Bound, ...] = get_args(Bound)
# Its boundaries are computed one by one, and trained models have a few dozen levels at most.
MAX_LEVEL = 1 << 16
# An index of 32 bits has no more channels of two or more levels.
_MAX_CHANNELS = 32


def _check_levels(value: object) -> object:
    given = list(value) if isinstance(value, tuple) else value
    if not isinstance(given, list) or not all(type(level) is int and 2 <= level <= MAX_LEVEL for level in given):
        raise ArgumentError(f"must be a list of integers in [2, {MAX_LEVEL}]")
    # The length first: a product of very many numbers takes long.
    if not 1 <= len(given) <= _MAX_CHANNELS or math.prod(given) > MAX_VOCABULARY:
        raise ArgumentError(f"must have a product in [2, {MAX_VOCABULARY}]")
    return given


class FiniteScalarQuantizer(ScalarQuantizer):
    """Digit = round(tanh(z + shift) half - offset) + L // 2 for every channel (Mentzer et al. 2023, arXiv:2309.15505).

    The formula is taken in exact arithmetic on the channel as it is (after `proj_in`, if there is one): see
    `fsq_boundaries`. A digit d is decoded as (d - L // 2) / (L // 2), with the symmetric bound as 2 d / (L - 1) - 1,
    rounded once to float32. The first channel counts least in the index. See `ScalarQuantizer` for the state.

    Attributes:
        levels: L of each of the D channels.
        bound: which half and shift, or which formula: see `fsq_boundaries.boundaries`.
    """

    kind: ClassVar[str] = "fsq"
    arguments: ClassVar[Mapping[str, Argument]] = {
        "levels": served(_check_levels),
        "bound": served(choice(*get_args(Bound))),
        **PROJECTIONS,
        "layout": LAYOUT,
    }

    def __init__(
        self,
        levels: Sequence[int],
        bound: Bound = "atanh",
        *,
        input_dim: int | None = None,
        output_dim: int | None = None,
    ) -> None:
        """Make the quantizer.

        Args:
            levels: of each of the D channels, how many values it has, each in [2, 65536]; their product is K.
            bound: "atanh" as in lucidrains' vector-quantize-pytorch and NVIDIA's Cosmos, "tan" as the paper prints it,
                "symmetric" as in Parker et al. 2024, arXiv:2411.19842, and the former's `preserve_symmetry`.
            input_dim: see `ScalarQuantizer`.
            output_dim: see `ScalarQuantizer`.

        Raises:
            InvalidOption: an argument has none of its values, or the levels' product exceeds 2^32.
        """
        if isinstance(levels, str) or not levels or not all(_is_level(level) for level in levels):
            raise InvalidOption(f"levels must be integers in [2, {MAX_LEVEL}], at least one, not {levels!r:.60}")
        if bound not in BOUNDS:
            raise InvalidOption(f"bound must be one of {', '.join(BOUNDS)}, not {bound!r}")
        super().__init__(levels, input_dim, output_dim)
        self.levels = tuple(int(level) for level in levels)
        self.bound: Bound = bound

    @property
    def code_space(self) -> CodeSpace:
        """As they are rounded."""
        return "bounded latents"

    def channels(self) -> list[Channel]:
        """Return what becomes of each of the D channels."""
        return [
            Channel(boundaries(level, self.bound), _values(level, self.bound), math.prod(self.levels[:place]))
            for place, level in enumerate(self.levels)
        ]

    def bounded(self, z: Tensor) -> Tensor:
        """Return what is rounded, in the codes' own unit: (N, D) float64 of channels (N, D), after `proj_in`.

        In float64 and no better, for reports: what `encode` compares with is exact.
        """
        if self.bound == "symmetric":
            return torch.tanh(z.double())
        levels = torch.tensor(self.levels, dtype=torch.float64, device=z.device)
        half = (levels - 1) * (1 + float(EPS) if self.bound == "atanh" else 1 - float(EPS)) / 2
        offset = (1 - levels % 2) / 2
        shift = (torch.atanh if self.bound == "atanh" else torch.tan)(offset / half)
        return (torch.tanh(z.double() + shift) * half - offset) / (levels // 2)


def _is_level(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and 2 <= int(value) <= MAX_LEVEL


def _values(level: int, bound: Bound) -> npt.NDArray[np.float32]:
    # Integers of at most 17 bits: a quotient in float64 is far from any middle of two float32 numbers.
    digits = np.arange(level)
    if bound == "symmetric":
        return ((2 * digits - (level - 1)) / (level - 1)).astype(np.float32)
    half_width = level // 2
    return ((digits - half_width) / half_width).astype(np.float32)
