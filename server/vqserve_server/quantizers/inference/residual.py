"""Chains of codebooks prepared for serving, and their arrangement: each stage quantizes the residual of the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import get_args

import torch
from torch import Tensor

from vqserve.errors import CodebookError, InvalidOption, TokenBeyondRange
from vqserve_server.quantizers.declared import Metric
from vqserve_server.quantizers.inference.lookup import FrozenLookup
from vqserve_server.quantizers.inference.staged import FrozenStages
from vqserve_server.quantizers.projections import Projection, largest_projected, project
from vqserve_server.quantizers.tensors import check_size, widen, widened
from vqserve_server.search import SearchCounts
from vqserve_server.search.rounding import affine, normalise

# Trained models have 46 at most.
MAX_QUANTIZERS = 256
# The float32 nearest to 1e-12: shorter residuals are divided by it, as by torch.nn.functional.normalize.
LEAST_LENGTH = float.fromhex("0x1.197998p-40")


@dataclass(frozen=True)
class Part:
    """A chain of stages. Each quantizes the residual of the stages before it.

    Attributes:
        start: the first of its channels of the latents.
        stop: the channel after the last.
        places: positions of its stages' indices among the indices of a token.
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
        stage_codes: K of each stage, in the order of a token's indices.
        code_dim: D of every stage.
        input_dim: C, channels of the latents.
        metric: how every stage is searched.
        decode_normalized: whether a cosine stage decodes to rows of length one.
        stage_projections: whether every stage has a projection in front of its codes and one behind them.
        inner_dim: channels that each part projects its latents to, and back; None: no such projections.
        groups: parts that the channels are cut into.
        first_quantizers: stages of the first of two parts that both see all channels and are added; 0: no such parts.
        normalize_residuals: whether every stage scales the residual to length one before it searches.
    """

    num_quantizers: int
    stage_codes: tuple[int, ...]
    code_dim: int
    input_dim: int
    metric: Metric
    decode_normalized: bool
    stage_projections: bool
    inner_dim: int | None
    groups: int
    first_quantizers: int
    normalize_residuals: bool

    def __post_init__(self) -> None:
        """Refuse numbers that do not fit together.

        Raises:
            InvalidOption: says which.
        """
        for name in ("groups", "code_dim", "input_dim"):
            check_size(name, getattr(self, name))
        if self.inner_dim is not None:
            check_size("inner_dim", self.inner_dim)
        first = self.first_quantizers
        if not isinstance(first, Integral) or isinstance(first, bool) or not 0 <= first < self.num_quantizers:
            raise InvalidOption(f"first_quantizers must be an integer in [0, {self.num_quantizers}), not {first!r:.40}")
        if self.metric not in get_args(Metric):
            raise InvalidOption(f"metric must be one of {', '.join(get_args(Metric))}, not {self.metric!r}")
        if self.decode_normalized and self.metric != "cosine":
            raise InvalidOption(f"decode_normalized is for metric 'cosine', not {self.metric!r}")
        if self.groups > 1 and first:
            raise InvalidOption("groups and first_quantizers exclude each other: set groups=1 or first_quantizers=0")
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


def stage_sizes(num_codes: int | Sequence[int], num_quantizers: int) -> tuple[int, ...]:
    """Return K of each stage.

    Args:
        num_codes: K of every stage, or a list with K of each, in the order of a token's indices.
        num_quantizers: n_q, the number of stages.

    Raises:
        InvalidOption: there are too many stages, the list has another length, or a number is not a positive integer.
    """
    check_size("num_quantizers", num_quantizers)
    if num_quantizers > MAX_QUANTIZERS:
        raise InvalidOption(f"{num_quantizers} quantizers are more than {MAX_QUANTIZERS}")
    if isinstance(num_codes, str) or not isinstance(num_codes, Sequence):
        check_size("num_codes", num_codes)
        return (int(num_codes),) * int(num_quantizers)
    if len(num_codes) != num_quantizers:
        raise InvalidOption(f"num_codes must have {num_quantizers} numbers, one for each stage, not {len(num_codes)}")
    for codes in num_codes:
        check_size("num_codes", codes)
    return tuple(int(codes) for codes in num_codes)


def sizes_written(sizes: Sequence[int]) -> int | list[int]:
    """Return K of each stage in the form of files and digests: one integer where all are equal, else a list."""
    return sizes[0] if len(set(sizes)) == 1 else list(sizes)


# Sums of a few hundred terms exceed those of their magnitudes by less.
_ROOM = 1.0 + 2.0**-10


@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenPart:
    """One chain.

    Attributes:
        part: its channels, and its places among a token's indices.
        stages: its codebooks, in order.
        projection: before the first stage; None: no projection.
        output_projection: of the sum of the stages; None: no projection.
        largest: how much the sum of the stages, and so any residual, can differ from zero, from the latents.
        normalizes: whether every stage scales the residual to length one before it searches.
    """

    part: Part
    stages: tuple[FrozenLookup, ...]
    projection: Projection | None
    output_projection: Projection | None
    largest: float
    normalizes: bool = False

    def encode(self, rows: Tensor, out: Tensor) -> None:
        """Write the indices of rows (n, C) to their places in `out` (n, q), as far as it has them."""
        count = self.part.stages_within(out.shape[1])
        if count == 0:
            return
        residual = rows[:, self.part.start : self.part.stop].contiguous()
        residual = project(residual, self.projection)
        if not self.normalizes:
            self._check_range(residual)
        for number, stage in enumerate(self.stages[:count]):
            residual = self.searched(residual)
            indices = stage.encode_rows(residual)
            out[:, self.part.places[number]] = indices
            if number + 1 < count:
                # One float32 subtraction (float64 where the latents or the codes are): defined, not approximated.
                residual = residual - stage.decode_rows(indices)

    def searched(self, residual: Tensor) -> Tensor:
        """Return what a stage searches, and what its code is subtracted from, of a residual (n, width)."""
        return normalise(residual, LEAST_LENGTH) if self.normalizes else residual

    def counting(self, counts: Sequence[SearchCounts]) -> FrozenPart:
        """Return a copy whose search for each of a token's indices adds to the counter of its place."""
        places = zip(self.stages, self.part.places, strict=True)
        return replace(self, stages=tuple(stage.counting([counts[place]]) for stage, place in places))

    def decode(self, indices: Tensor) -> Tensor | None:
        """Return the part's rows (n, channels), at least float32, of indices (n, q); None if they are none of its."""
        count = self.part.stages_within(indices.shape[1])
        if count == 0:
            return None
        stages, places = self.stages, self.part.places
        total = widen(stages[0].decode_rows(indices[:, places[0]]))
        for number in range(1, count):
            total = total + stages[number].decode_rows(indices[:, places[number]])
        return total if self.output_projection is None else affine(total, *self.output_projection)

    def _check_range(self, rows: Tensor) -> None:
        limit = torch.finfo(torch.promote_types(rows.dtype, self.stages[0].weight_dtype)).max
        too_large = ~(rows.abs().amax(dim=1).double() < limit / _ROOM - self.largest)
        if bool(too_large.any()):
            row = int(torch.nonzero(too_large)[0])
            raise TokenBeyondRange(
                "what the stages leave of {where} may leave the range of float32",
                array="tokens",
                row=row,
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenResidual(FrozenStages):
    """Parts that have channels of their own, side by side, or that all have the same channels and are added."""

    _parts: tuple[FrozenPart, ...]
    _are_added: bool

    @property
    def search_backend(self) -> str:
        """The name of the first stage's search backend."""
        return self._parts[0].stages[0].search_backend

    def counting(self, counts: Sequence[SearchCounts]) -> FrozenResidual:
        """Return a copy whose stages count; see `FrozenQuantizer.counting`."""
        return replace(self, _parts=tuple(part.counting(counts) for part in self._parts))

    def _decoded(self, indices: Tensor) -> Tensor:
        rows = [part.decode(indices) for part in self._parts]
        return self._added(rows) if self._are_added else self._side_by_side(rows, len(indices))

    def _added(self, rows: list[Tensor | None]) -> Tensor:
        total, *rest = [part_rows for part_rows in rows if part_rows is not None]
        for part_rows in rest:
            total = total + part_rows
        return total

    def _side_by_side(self, rows: list[Tensor | None], count: int) -> Tensor:
        # A part none of whose stages is decoded contributes zeros.
        return torch.cat(
            [
                torch.zeros(count, part.part.stop - part.part.start, device=self.device) if found is None else found
                for part, found in zip(self._parts, rows, strict=True)
            ],
            dim=1,
        )


def check_sums(parts: Sequence[FrozenPart], *, are_added: bool, dtype: torch.dtype) -> None:
    """Reject codebooks whose sums may overflow, so that decode need not check.

    Raises:
        CodebookError: says which part.
    """
    total = torch.zeros((), dtype=torch.float64)
    for number, part in enumerate(parts):
        sums = sum_of_largest(part.stages)
        outputs = largest_projected(sums, part.output_projection)
        total = total + outputs if are_added else outputs
        # A projection is rounded to float32, whatever it projects.
        limit = torch.finfo(torch.float32 if part.output_projection is not None else dtype).max
        if not (bool((sums < torch.finfo(widened(dtype)).max).all()) and bool((total * _ROOM < limit).all())):
            raise CodebookError(f"the codes of part {number} may add up to values beyond float32's range")


def sum_of_largest(stages: Sequence[FrozenLookup]) -> Tensor:
    """Return the greatest magnitude (width,) float64 of the sum of stages in every channel."""
    return torch.stack([stage.largest_latents() for stage in stages]).sum(dim=0) * _ROOM
