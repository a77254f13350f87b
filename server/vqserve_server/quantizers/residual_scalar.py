"""Residual finite scalar quantization: stages of FSQ on ever finer grids, as lucidrains' libraries have computed it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from vqserve.errors import InvalidOption
from vqserve.layout import Layout
from vqserve_server.quantizers.arguments import PROJECTIONS, Argument, check_layout, choice, integer, served
from vqserve_server.quantizers.fsq_boundaries import StageBound, stage_boundaries
from vqserve_server.quantizers.inference.first_bound import Curve, FirstBound
from vqserve_server.quantizers.inference.residual import MAX_QUANTIZERS, Part
from vqserve_server.quantizers.inference.residual_scalar import FrozenResidualScalar, FrozenScalarPart
from vqserve_server.quantizers.inference.scalar import Channel, FrozenScalar
from vqserve_server.quantizers.projections import ProjectedModule, on_device, projection
from vqserve_server.quantizers.scalar import LEVELS, checked_levels, number_of_codes
from vqserve_server.quantizers.staged import StagedQuantizer
from vqserve_server.quantizers.tensors import (
    check_size,
)
from vqserve_server.search.quotients import round_fraction

ResidualBound = Literal["atanh_twice", "atanh", "symmetric", "soft_clamp"]
Scales = Literal["levels_minus_one", "levels"]
# How every stage rounds.
_STAGE_BOUNDS: Mapping[ResidualBound, StageBound] = {
    "atanh_twice": "atanh",
    "atanh": "atanh",
    "symmetric": "symmetric",
    "soft_clamp": "clamp",
}
# A float32 residual has nothing left for a finer stage, and all values stay far from denormals.
_FINEST = 1 << 100


class ScalarPart(ProjectedModule):
    """The projections of one chain of stages: the tensors of `ProjectedModule`, for those that there are."""

    def __init__(self, part: Part, code_dim: int, output_width: int | None, *, is_projected: bool) -> None:
        super().__init__()
        self.part = part
        self.proj_in = projection("input_dim", part.stop - part.start if is_projected else None, code_dim)
        self.proj_out = projection("output_dim", code_dim, output_width)


class ResidualFiniteScalarQuantizer(StagedQuantizer):
    """n_q indices for a token, the first of which are the coarsest. Inference only: there is no `forward`.

    Stage i rounds the residual r_i, divided by its scale s_i, to the grid of FSQ, and the next one gets r_i - q_i, with
    q_i the grid's value times s_i; decode adds the q_i. How r_0 is made of the latents, how a stage rounds and what the
    scales are has changed between versions of vector-quantize-pytorch, whose ResidualFSQ and GroupedResidualFSQ this
    is: see `bound` and `scales`. For the digits each of these formulas is taken in exact arithmetic on the residual as
    it is: see `fsq_boundaries`. r_0 and q_i are exact values rounded once to float32; differences and sums are
    float32's (differences are float64's where r_0 is: for float64 latents that are neither projected nor bounded).

    State: `parts.{p}.` with the tensors of `ProjectedModule` for the projections that there are.

    Attributes:
        levels: L of each of the D channels.
        bound: see `__init__`.
        scales: see `__init__`.
        groups: parts that the channels are cut into.
        layout: channels first, unless changed: (b, C, s) has indices (b, n_q, s).
    """

    kind: ClassVar[str] = "residual_fsq"
    arguments: ClassVar[Mapping[str, Argument]] = {
        "levels": LEVELS,
        "num_quantizers": served(integer(1, MAX_QUANTIZERS)),
        "bound": served(choice(*get_args(ResidualBound))),
        "scales": served(choice(*get_args(Scales))),
        "groups": served(integer(1, MAX_QUANTIZERS)),
        **PROJECTIONS,
        # A reader of the file should not have to know the usual layout of residual codebooks.
        "layout": served(check_layout),
    }

    def __init__(
        self,
        levels: Sequence[int],
        num_quantizers: int,
        bound: ResidualBound,
        scales: Scales,
        *,
        groups: int = 1,
        input_dim: int | None = None,
        output_dim: int | None = None,
    ) -> None:
        """Draw the projections as torch's layers do; a state dict is to follow.

        Versions are those of vector-quantize-pytorch. Each version has one default pair of `bound` and `scales`:
        up to 1.18.3 "atanh_twice", from 1.18.5 to 1.25 "atanh", both with "levels_minus_one"; from 1.26 on "soft_clamp"
        with "levels".

        Args:
            levels: of each of the D channels of a group, how many values it has, each in [2, 65536]; their product is
                K.
            num_quantizers: n_q, stages of all groups together, at most 256.
            bound: "atanh_twice": r_0 = b(x) with FSQ's b(x) = tanh(x + atanh(offset / half)) half - offset, and a stage
                rounds b(r_i / s_i) (up to 1.18.3; X-Codec 2, NeuCodec and transformers' copy);
                "atanh": r_0 = x, and a stage rounds b(r_i / s_i) (from 1.18.5 to 1.25);
                "symmetric": r_0 = x, and a stage's digit is (L - 1)(tanh(r_i / s_i) + 1) / 2 + 1/2, rounded down
                (`preserve_symmetry` from 1.22.16 to 1.25, `bound_hard_clamp=False` from 1.26 on);
                "soft_clamp": r_0 = tanh(x / c) c with c = 1 + 1 / (L - 1), and a stage's digit is that of "symmetric"
                with r_i / s_i limited to [-1, 1] in place of its tanh (from 1.26 on).
            scales: "levels_minus_one": s_i = (L - 1)^-i (up to 1.25); "levels": s_i = L^-i (from 1.26 on).
            groups: cut the channels into so many parts of as many stages each. The indices of a token are those of all
                groups' first stages, then of their second ones, and so on.
            input_dim: C, channels of all groups together that are projected to D in each group; None: C is D in each
                group, without a projection.
            output_dim: channels of all groups together that the sums of codes are projected to; None: D in each group,
                without a projection.

        Raises:
            InvalidOption: the arguments do not fit together.
        """
        super().__init__()
        self.levels = checked_levels(levels)
        self.num_codes = number_of_codes(self.levels)
        for name, value, known in (("bound", bound, ResidualBound), ("scales", scales, Scales)):
            if value not in get_args(known):
                raise InvalidOption(f"{name} must be one of {', '.join(get_args(known))}, not {value!r:.60}")
        self.bound: ResidualBound = bound
        self.scales: Scales = scales
        for name, size in (("num_quantizers", num_quantizers), ("groups", groups)):
            check_size(name, size)
        if num_quantizers > MAX_QUANTIZERS:
            raise InvalidOption(f"{num_quantizers} quantizers are more than {MAX_QUANTIZERS}")
        self.code_dim, self.num_quantizers, self.groups = len(self.levels), int(num_quantizers), int(groups)
        self.input_dim = self._channels("input_dim", input_dim)
        self.output_dim = self._channels("output_dim", output_dim)
        if num_quantizers % groups:
            raise InvalidOption(f"{groups} groups do not divide {num_quantizers} quantizers")
        if max(self._divisors(level)[-1] for level in self.levels) > _FINEST:
            raise InvalidOption(f"the last of {num_quantizers // groups} stages is too fine for a float32 residual")
        # Without projections codes approximate what `bound` makes of the latents, and not these.
        self.is_approximate = input_dim is not None and input_dim == output_dim
        self.layout = Layout.CHANNELS_FIRST
        output_width = None if output_dim is None else output_dim // groups
        self.parts = nn.ModuleList(
            ScalarPart(part, self.code_dim, output_width, is_projected=input_dim is not None) for part in self._parts()
        )

    def _channels(self, name: str, channels: int | None) -> int:
        if channels is None:
            return self.code_dim * self.groups
        check_size(name, channels)
        if channels % self.groups:
            raise InvalidOption(f"{self.groups} groups do not divide {channels} channels of {name}")
        return int(channels)

    def _parts(self) -> list[Part]:
        # The groups' first stages come first, then their second ones, so that fewer indices are coarser everywhere.
        width = self.input_dim // self.groups
        return [
            Part(group * width, (group + 1) * width, tuple(range(group, self.num_quantizers, self.groups)))
            for group in range(self.groups)
        ]

    @property
    def projected_input_dim(self) -> int | None:
        """Channels that are projected in; None: there is no projection."""
        return None if self.chain_modules()[0].projected_input_dim is None else self.input_dim

    @property
    def projected_output_dim(self) -> int | None:
        """Channels that are projected out; None: there is no projection."""
        return None if self.chain_modules()[0].projected_output_dim is None else self.output_dim

    @property
    def weight_dtype(self) -> torch.dtype:
        """The type that decode returns: the projections', and float32 without any."""
        return next((parameter.dtype for parameter in self.parameters()), torch.float32)

    def chain_modules(self) -> list[ScalarPart]:
        """Return the parts."""
        # nn.ModuleList forgets the type of what it holds.
        return [part for part in self.parts if isinstance(part, ScalarPart)]

    def stages(self) -> list[list[Channel]]:
        """Return what becomes of each of a group's D channels in every stage: of the residual, not divided."""
        bound = _STAGE_BOUNDS[self.bound]
        is_symmetric = bound != "atanh"
        of_channels = []
        for place, level in enumerate(self.levels):
            divisors = self._divisors(level)
            weight = math.prod(self.levels[:place])
            edges = stage_boundaries(level, bound, divisors)
            of_channels.append(
                [
                    Channel(of_stage, _values(level, divisor, is_symmetric=is_symmetric), weight)
                    for of_stage, divisor in zip(edges, divisors, strict=True)
                ]
            )
        return [list(channels) for channels in zip(*of_channels, strict=True)]

    def frozen(self, device: torch.device, search: str = "auto") -> FrozenResidualScalar:
        """Return the form that serves; see `Quantizer.frozen`."""
        sizes = self.sizes(device)
        widths = {"input_dim": self.code_dim, "output_dim": self.code_dim, "weight_dtype": torch.float32}
        stages = tuple(
            FrozenScalar.of(
                channels, **{**sizes, **widths, "num_quantizers": 1}, search=search, projections=(None, None)
            )
            for channels in self.stages()
        )
        first_bound = self.first_bound(device)
        parts = tuple(
            FrozenScalarPart(
                part=module.part,
                stages=stages,
                first_bound=first_bound,
                projection=on_device(module.input_projection(), device),
                output_projection=on_device(module.output_projection(), device),
            )
            for module in self.chain_modules()
        )
        for part in parts:
            part.check_outputs()
        return FrozenResidualScalar(**sizes, _parts=parts)

    def first_bound(self, device: torch.device) -> FirstBound | None:
        """Return what makes r_0 of a group's channels; None: r_0 is the channels."""
        match self.bound:
            case "atanh_twice":
                return FirstBound.of([Curve.of_fsq(level) for level in self.levels], device)
            case "soft_clamp":
                return FirstBound.of([Curve.of_soft_clamp(level) for level in self.levels], device)
            case _:
                return None

    def _divisors(self, level: int) -> tuple[int, ...]:
        base = level - 1 if self.scales == "levels_minus_one" else level
        return tuple(base**stage for stage in range(self.num_quantizers // self.groups))


def _values(level: int, divisor: int, *, is_symmetric: bool) -> npt.NDArray[np.float32]:
    # A digit d is (2 d - width) / width in the grid's own unit.
    width = level - 1 if is_symmetric else 2 * (level // 2)
    return np.array([round_fraction(Fraction(2 * digit - width, width * divisor)) for digit in range(level)])
