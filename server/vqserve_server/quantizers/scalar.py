"""Quantizers without a codebook: every channel has a few values of its own (FSQ), or two (LFQ)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqserve.errors import InvalidOption, rows_placed
from vqserve.validation import LARGEST_VOCABULARY, check_indices_rank
from vqserve_server.quantizers.arguments import (
    FLAG,
    LAYOUT,
    PROJECTIONS,
    Argument,
    ArgumentError,
    choice,
    integer,
    served,
)
from vqserve_server.quantizers.declared import CodeSpace
from vqserve_server.quantizers.fsq_boundaries import EPS, Bound, boundaries
from vqserve_server.quantizers.inference.base import freeze
from vqserve_server.quantizers.inference.scalar import Channel, FrozenScalar
from vqserve_server.quantizers.projections import ProjectedModule, projection
from vqserve_server.quantizers.quantizer import Quantizer
from vqserve_server.quantizers.tensors import (
    check_finite,
    check_size,
    checked_indices,
    from_rows,
    grid_of,
    grid_of_entries,
    to_rows,
    widen,
)
from vqserve_server.search.quotients import round_inverse_root


class ScalarQuantizer(ProjectedModule, Quantizer):
    """One index for the digits of D channels. Inference only: there is no `forward`, and nothing is searched.

    State: none but the tensors of `ProjectedModule`, for the projections that there are.
    """

    def __init__(self, levels: Sequence[int], input_dim: int | None, output_dim: int | None) -> None:
        """Draw the projections as torch's layers do; a state dict is to follow.

        Args:
            levels: of each of the D channels, how many values it has.
            input_dim: channels that are projected to D before the rounding; None: D, without a projection.
            output_dim: channels that codes are projected to when they are decoded; None: D, without a projection.

        Raises:
            InvalidOption: the values' combinations are more than an index can name, or a width is none.
        """
        super().__init__()
        self.num_codes = number_of_codes(levels)
        self.code_dim = len(levels)
        self.input_dim = self.code_dim if input_dim is None else input_dim
        self.output_dim = self.code_dim if output_dim is None else output_dim
        self.proj_in = projection("input_dim", input_dim, self.code_dim)
        self.proj_out = projection("output_dim", self.code_dim, output_dim)

    @abstractmethod
    def channels(self) -> list[Channel]:
        """Return what becomes of each of the D channels."""

    @property
    def weight_dtype(self) -> torch.dtype:
        """The type that decode returns: the projections', and float32 without any."""
        return next((parameter.dtype for parameter in self.parameters()), torch.float32)

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """Return the index of every token, exact and the same on every device.

        Args:
            z: (b, C, h, w), (b, C, t, h, w), (b, s, C) or (n, C), C = input_dim, or as `layout` says; floating point.

        Returns:
            int64 indices over the grid: (b, h, w), (b, t, h, w), (b, s) or (n,).

        Raises:
            InvalidShape: another rank or channel count.
            InvalidDtype: z is not floating point.
            NonFiniteLatents: z holds NaN or infinity, or a projection leaves float32's range; names the position.
            CodebookError: a projection holds NaN or infinity.
        """
        grid = grid_of(z, self.input_dim, self.layout)
        check_finite(z)
        rows = widen(to_rows(z, self.layout))
        with rows_placed(grid):
            return freeze(self, device=z.device).encode_rows(rows).reshape(grid)

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Return the latents of indices.

        Args:
            indices: (b, h, w), (b, t, h, w), (b, s) or (n,), any integer type, in [0, num_codes).

        Returns:
            (b, C, h, w), (b, C, t, h, w), (b, s, C) or (n, C), C = output_dim, or as `layout` says; contiguous.

        Raises:
            InvalidShape: the indices have not 1 to 4 axes.
            InvalidDtype: they are not integers.
            IndexOutOfRange: one is out of range; names the position.
        """
        check_indices_rank(indices.ndim)
        ids = checked_indices(indices, self.num_codes).reshape(-1)
        return from_rows(freeze(self, device=ids.device).decode_rows(ids), indices.shape, self.layout)

    @torch.no_grad()
    def get_codebook_entry(self, indices: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Return the codes of indices before any projection; see `AbstractQuantizer.get_codebook_entry`.

        Args:
            indices: any shape and integer type, in [0, num_codes).
            shape: channel-last shape of 2 to 5 axes that the result is laid out from; None: indices' shape.

        Returns:
            (*indices.shape, D), or as `shape` says.

        Raises:
            InvalidShape: `shape` does not end in D, or holds another number of tokens than there are indices.
            InvalidDtype: the indices are not integers.
            IndexOutOfRange: one is out of range; names the position.
        """
        grid = None if shape is None else grid_of_entries(shape, width=self.code_dim, count=indices.numel())
        ids = checked_indices(indices, self.num_codes)
        rows = freeze(self, device=ids.device).decode_rows(ids.reshape(-1), output="code_rows")
        return rows.reshape(*ids.shape, self.code_dim) if grid is None else from_rows(rows, grid, self.layout)

    def frozen(self, device: torch.device, search: str = "auto") -> FrozenScalar:
        """Return the form that serves; see `Quantizer.frozen`."""
        return FrozenScalar.of(
            self.channels(),
            **self.sizes(device),
            search=search,
            projections=(self.input_projection(), self.output_projection()),
        )


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
    if not 1 <= len(given) <= _MAX_CHANNELS or math.prod(given) > LARGEST_VOCABULARY:
        raise ArgumentError(f"must have a product in [2, {LARGEST_VOCABULARY}]")
    return given


LEVELS = served(_check_levels)


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
        "levels": LEVELS,
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
        levels = checked_levels(levels)
        if bound not in BOUNDS:
            raise InvalidOption(f"bound must be one of {', '.join(BOUNDS)}, not {bound!r}")
        super().__init__(levels, input_dim, output_dim)
        self.levels = levels
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
        """Return the values before rounding, in the unit of the codes: (N, D) float64 from (N, D) after `proj_in`.

        Computed in float64, for reports; `encode` itself is exact.
        """
        if self.bound == "symmetric":
            return torch.tanh(z.double())
        levels = torch.tensor(self.levels, dtype=torch.float64, device=z.device)
        half = (levels - 1) * (1 + float(EPS) if self.bound == "atanh" else 1 - float(EPS)) / 2
        offset = (1 - levels % 2) / 2
        shift = (torch.atanh if self.bound == "atanh" else torch.tan)(offset / half)
        return (torch.tanh(z.double() + shift) * half - offset) / (levels // 2)


def checked_levels(levels: Sequence[int]) -> tuple[int, ...]:
    """Return levels as plain integers.

    Raises:
        InvalidOption: they are not integers in [2, MAX_LEVEL], or there are none.
    """
    if isinstance(levels, str) or not levels or not all(_is_level(level) for level in levels):
        raise InvalidOption(f"levels must be integers in [2, {MAX_LEVEL}], at least one, not {levels!r:.60}")
    return tuple(int(level) for level in levels)


def number_of_codes(levels: Sequence[int]) -> int:
    """Return the product of levels.

    Raises:
        InvalidOption: it is more than an index can name.
    """
    # Python's integers cannot overflow.
    product = math.prod(int(level) for level in levels)
    if product > LARGEST_VOCABULARY:
        raise InvalidOption(f"{product} codes are more than an index of 32 bits can name")
    return product


def _is_level(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and 2 <= int(value) <= MAX_LEVEL


def _values(level: int, bound: Bound) -> npt.NDArray[np.float32]:
    # Integers of at most 17 bits: a quotient in float64 is far from any middle of two float32 numbers.
    digits = np.arange(level)
    if bound == "symmetric":
        return ((2 * digits - (level - 1)) / (level - 1)).astype(np.float32)
    half_width = level // 2
    return ((digits - half_width) / half_width).astype(np.float32)


BitOrder = Literal["big", "little"]
MAX_BITS = 32


class LookupFreeQuantizer(ScalarQuantizer):
    """Bit k of the index is 1 where channel k is greater than zero: zero, of either sign, is 0.

    Yu et al. 2023, arXiv:2310.05737; as binary spherical quantization the same on the unit sphere, Zhao et al. 2024,
    arXiv:2406.07548. See `ScalarQuantizer` for the state.

    Attributes:
        bits: D.
        bit_order: "big": the first channel is the most significant bit (lucidrains); "little": the least
            (Open-MAGVIT2).
        spherical: whether codes are +-1/sqrt(D), rounded once to float32, and not +-1.
    """

    kind: ClassVar[str] = "lfq"
    arguments: ClassVar[Mapping[str, Argument]] = {
        "bits": served(integer(1, MAX_BITS)),
        "bit_order": served(choice(*get_args(BitOrder))),
        "spherical": FLAG,
        **PROJECTIONS,
        "layout": LAYOUT,
    }

    def __init__(
        self,
        bits: int,
        bit_order: BitOrder,
        spherical: bool = False,
        *,
        input_dim: int | None = None,
        output_dim: int | None = None,
    ) -> None:
        """Make the quantizer.

        Args:
            bits: D, the channels and bits, at most 32.
            bit_order: "big" or "little"; trained models differ.
            spherical: codes of length one.
            input_dim: see `ScalarQuantizer`.
            output_dim: see `ScalarQuantizer`.

        Raises:
            InvalidOption: an argument has none of its values.
        """
        check_size("bits", bits)
        if bits > MAX_BITS:
            raise InvalidOption(f"{bits} bits are more than an index of {MAX_BITS} can hold")
        if bit_order not in get_args(BitOrder):
            raise InvalidOption(f"bit_order must be one of {', '.join(get_args(BitOrder))}, not {bit_order!r}")
        super().__init__([2] * bits, input_dim, output_dim)
        self.bits = int(bits)
        self.bit_order = bit_order
        self.spherical = bool(spherical)

    @property
    def code_space(self) -> CodeSpace:
        """Codes of length one are compared with directions: the length of a latent has no effect."""
        return "directions" if self.spherical else "latents"

    def channels(self) -> list[Channel]:
        """Return what becomes of each of the D channels."""
        value = round_inverse_root(self.bits) if self.spherical else np.float32(1.0)
        values = np.array([-value, value], np.float32)
        places = range(self.bits) if self.bit_order == "little" else reversed(range(self.bits))
        return [Channel(np.zeros(1), values, 1 << place) for place in places]
