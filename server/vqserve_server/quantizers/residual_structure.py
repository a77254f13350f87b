"""How the stages of a residual quantizer are arranged, from the numbers that describe it."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import get_args

from vqserve_server.errors import InvalidOption
from vqserve_server.quantizers.checks import check_size
from vqserve_server.quantizers.quantizer import Metric

# Trained models have 46 at most.
MAX_QUANTIZERS = 256


@dataclass(frozen=True)
class Part:
    """A chain of stages, each of which quantizes what those before it left.

    Attributes:
        start: the first of its channels of the latents.
        stop: the channel after the last.
        places: where in a token's indices those of its stages are.
    """

    start: int
    stop: int
    places: tuple[int, ...]

    def stages_within(self, count: int) -> int:
        """Return how many of the stages are among a token's first `count` indices."""
        return sum(place < count for place in self.places)


@dataclass(frozen=True, kw_only=True)
class ResidualStructure:
    """The arrangement, checked.

    Attributes:
        num_quantizers: stages in all, indices per token.
        num_codes: K of every stage.
        code_dim: D of every stage.
        input_dim: C, channels of the latents.
        metric: how every stage is searched.
        decode_normalized: whether a cosine stage decodes to rows of length one.
        stage_projections: whether every stage has a projection in front of its codes and one behind them.
        inner_dim: channels that each part projects its latents to, and back; None: no such projections.
        groups: parts that the channels are cut into.
        first_quantizers: stages of the first of two parts that both see all channels and are added; 0: no such parts.
    """

    num_quantizers: int
    num_codes: int
    code_dim: int
    input_dim: int
    metric: Metric
    decode_normalized: bool
    stage_projections: bool
    inner_dim: int | None
    groups: int
    first_quantizers: int

    def __post_init__(self) -> None:
        """Refuse numbers that do not fit together.

        Raises:
            InvalidOption: says which.
        """
        for name in ("groups", "num_quantizers", "num_codes", "code_dim", "input_dim"):
            check_size(name, getattr(self, name))
        if self.inner_dim is not None:
            check_size("inner_dim", self.inner_dim)
        first = self.first_quantizers
        if not isinstance(first, Integral) or isinstance(first, bool) or not 0 <= first < self.num_quantizers:
            raise InvalidOption(f"first_quantizers must be an integer in [0, {self.num_quantizers}), not {first!r:.40}")
        if self.num_quantizers > MAX_QUANTIZERS:
            raise InvalidOption(f"{self.num_quantizers} quantizers are more than {MAX_QUANTIZERS}")
        if self.metric not in get_args(Metric):
            raise InvalidOption(f"metric must be one of {', '.join(get_args(Metric))}, not {self.metric!r}")
        if self.decode_normalized and self.metric != "cosine":
            raise InvalidOption(f"decode_normalized is for metric 'cosine', not {self.metric!r}")
        if self.groups > 1 and first:
            raise InvalidOption("groups and first_quantizers are two arrangements of which only one can be had")
        if self.num_quantizers % self.groups or self.input_dim % self.groups:
            raise InvalidOption(
                f"{self.groups} groups do not divide {self.num_quantizers} quantizers and {self.input_dim} channels"
            )
        if self.code_dim != self.width and not self.stage_projections:
            raise InvalidOption(
                f"codes of width {self.code_dim} cannot be subtracted from {self.width} channels without projections"
            )

    @property
    def width(self) -> int:
        """Channels of the residuals, in each part."""
        return self.input_dim // self.groups if self.inner_dim is None else self.inner_dim

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts: one, or the groups, or the first and the rest."""
        if self.first_quantizers:
            first, rest = range(self.first_quantizers), range(self.first_quantizers, self.num_quantizers)
            return tuple(Part(0, self.input_dim, tuple(places)) for places in (first, rest))
        # The groups' first stages come first, then their second ones, so that fewer indices are coarser everywhere.
        size = self.input_dim // self.groups
        return tuple(
            Part(group * size, (group + 1) * size, tuple(range(group, self.num_quantizers, self.groups)))
            for group in range(self.groups)
        )
