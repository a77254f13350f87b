"""Verification of an import: our indices of latents against the indices of the model's own code.

Libraries search in float32, where rounding can swap two codes at nearly the same distance. Our index is the exact
winner. Another index is accepted as a near-tie if its float64 gap to the winner is below the float32 error bound of the
search and of the projections and residuals before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqserve.errors import ForeignCheckpointError, InvalidArgument
from vqserve.layout import Layout, grid_shape
from vqserve_server.quantizers import Quantizer
from vqserve_server.quantizers.inference.residual import LEAST_LENGTH, FrozenPart
from vqserve_server.quantizers.inference.scalar import Channel
from vqserve_server.quantizers.projections import Projection, project
from vqserve_server.quantizers.residual import ResidualPart
from vqserve_server.quantizers.tensors import from_rows, layout_of, to_rows, widen
from vqserve_server.search import Objective
from vqserve_tools.importing.files import UNNAMED, open_foreign
from vqserve_tools.importing.reasons import Reason, find_reason

# Error bound of a float32 sum of products whose factors have norm 1, for up to some hundred terms.
_LOSS = 2.0**-20
# At most this many differences are examined; if there are more, most of them are no near-ties.
_MAX_DIFFERENCES = 1 << 14


@dataclass(frozen=True)
class Verification:
    """Result of a comparison of indices.

    Attributes:
        total: number of compared indices.
        different: number of indices that differ.
        near_ties: number of differing indices that float32 cannot decide, or that follow from such an index in an
            earlier stage.
        first: text about the first difference, if possible one that is not a near-tie; "" without differences.
        by_stage: number of indices of each stage that differ and are not near-ties; empty if a token has one index.
        reason: a change that would make most indices agree; None: not needed, or none was found.
    """

    total: int
    different: int
    near_ties: int
    first: str
    by_stage: tuple[int, ...] = ()
    reason: Reason | None = None

    @property
    def holds(self) -> bool:
        """Whether all differences are near-ties."""
        return self.different == self.near_ties

    def __str__(self) -> str:
        text = f"{self.total - self.different} of {self.total} indices agree"
        if not self.different:
            return text
        others = f"of the {self.different} others {self.near_ties} are near-ties"
        text += f"; {others} (float32 rounding explains the difference); {self.first}"
        if any(self.by_stage):
            text += f"; other indices by stage: {', '.join(map(str, self.by_stage))}"
        return text


def verify_files(quantizer: Quantizer, latents: Path, indices: Path) -> Verification:
    """Compare a quantizer's indices of latents with the expected indices.

    Args:
        quantizer: quantizer with its layout set.
        latents: .npy file of 2 to 5 axes.
        indices: .npy file with the shape of `Quantizer.encode`'s result, or flattened: (N,) or (N, 1) for N tokens.

    Raises:
        ForeignCheckpointError: a file cannot be read or does not fit, or indices differ by more than near-ties.
    """
    outcome = verify(quantizer, _array(latents), _array(indices), names=(latents.name, indices.name))
    if not outcome.holds:
        reason = outcome.reason or (
            "no other metric, layout, bound, bit order or order of stages explains it; a projection or a norm of the "
            "model may be left out, or the latents are from another place in it"
        )
        raise ForeignCheckpointError(f"--verify: {outcome}; {reason}; nothing was written")
    return outcome


def verify(
    quantizer: Quantizer,
    latents: npt.NDArray[Any],
    indices: npt.NDArray[Any],
    *,
    names: tuple[str, str] = ("latents", "indices"),
) -> Verification:
    """Compare a quantizer's indices of latents with the expected indices.

    Args:
        quantizer: quantizer with its layout set.
        latents: floating-point numbers, 2 to 5 axes.
        indices: integers, with the shape of `Quantizer.encode`'s result; if a token has one index, also flattened in
            C order: (N,) or (N, 1) for N tokens.
        names: names of the two arrays in error messages.

    Raises:
        ForeignCheckpointError: the arrays do not fit the quantizer or each other.
    """
    if latents.dtype.kind != "f" or latents.dtype.itemsize > 8:
        raise ForeignCheckpointError(f"--verify: {names[0]} is {latents.dtype}: latents are floating-point numbers")
    z = torch.from_numpy(np.ascontiguousarray(latents, latents.dtype.newbyteorder("=")))
    try:
        ours = quantizer.encode(z)
    except InvalidArgument as error:
        raise ForeignCheckpointError(f"--verify: {names[0]}: {error}") from None
    if indices.dtype.kind not in "iu":
        raise ForeignCheckpointError(f"--verify: {names[1]} is {indices.dtype}: indices are integers")
    if indices.shape in ((ours.numel(),), (ours.numel(), 1)) and not quantizer.has_stages:
        indices = indices.reshape(tuple(ours.shape))
    if indices.shape != tuple(ours.shape):
        raise ForeignCheckpointError(
            f"--verify: {names[1]} has shape {indices.shape}, the latents' indices have {tuple(ours.shape)}"
            f"{_axis_hint(quantizer, indices, tuple(ours.shape))}"
        )
    if not indices.size:
        raise ForeignCheckpointError(f"--verify: {names[1]} has no indices, so nothing would be compared")
    if indices.dtype.kind == "u":
        # An index beyond int64 would become a negative one.
        indices = np.minimum(indices.astype(np.uint64), np.uint64(np.iinfo(np.int64).max))
    theirs = torch.from_numpy(indices.astype(np.int64))
    differs = ours != theirs
    different = int(differs.sum())
    if not different:
        return Verification(ours.numel(), 0, 0, "")
    near = near_ties(quantizer, z, ours, theirs)
    shown = differs & ~near if bool((differs & ~near).any()) else differs
    position = torch.nonzero(shown)[0].tolist()
    first = f"{position} is {int(ours[tuple(position)])} here and {int(theirs[tuple(position)])} there"
    others = differs & ~near
    return Verification(
        total=ours.numel(),
        different=different,
        near_ties=int((differs & near).sum()),
        first=first,
        by_stage=tuple(to_rows(others, quantizer.layout).sum(dim=0).tolist()) if quantizer.has_stages else (),
        reason=find_reason(quantizer, z, ours, theirs) if bool(others.any()) else None,
    )


def _axis_hint(quantizer: Quantizer, indices: npt.NDArray[Any], shape: tuple[int, ...]) -> str:
    """Return how to move the axis of the stages, where that gives the shape; else an empty text."""
    if not quantizer.has_stages or indices.ndim != len(shape):
        return ""
    to = 1 if layout_of(len(shape), quantizer.layout) is Layout.CHANNELS_FIRST else len(shape) - 1
    for axis in range(indices.ndim):
        if np.moveaxis(indices, axis, to).shape == shape:
            return f": its stages are axis {axis}: save numpy.moveaxis(indices, {axis}, {to})"
    return ""


def _array(path: Path) -> npt.NDArray[Any]:
    with open_foreign(path) as arrays:
        if UNNAMED not in arrays:
            raise ForeignCheckpointError(f"--verify: {path.name} holds arrays by name: it should be one .npy")
        return arrays[UNNAMED].read()


@torch.no_grad()
def near_ties(quantizer: Quantizer, z: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
    """Return which of their indices differ from ours and are accepted as near-ties.

    An index of a later stage is also accepted if the first index that differs in its chain is accepted: after that
    index their residual differs from ours.

    Args:
        quantizer: quantizer of the exact indices `ours`.
        z: latents.
        ours: int64 indices from `Quantizer.encode`.
        theirs: int64 indices of the same shape, with any values.

    Returns:
        bool of the same shape, true for accepted near-ties.
    """
    rows = widen(to_rows(z, quantizer.layout))
    if not quantizer.has_stages:
        differs = torch.nonzero((ours != theirs).reshape(-1))[:_MAX_DIFFERENCES, 0]
        near = torch.zeros(ours.numel(), dtype=torch.bool)
        differing, noise = rows[differs], rows.new_zeros(len(differs), dtype=torch.float64)
        near[differs] = _single(quantizer, differing, noise, ours.reshape(-1)[differs], theirs.reshape(-1)[differs])
        return near.reshape(ours.shape)
    layout = layout_of(ours.ndim, quantizer.layout)
    mine, yours = (to_rows(indices, quantizer.layout) for indices in (ours, theirs))
    differs = torch.nonzero((mine != yours).any(dim=1))[:_MAX_DIFFERENCES, 0]
    near = torch.zeros(mine.shape, dtype=torch.bool)
    for part in quantizer.chains():
        for place, found in _stages(part, rows[differs], mine[differs], yours[differs]):
            near[differs, place] = found
    return from_rows(near, grid_shape(ours.shape, layout), quantizer.layout)


def _single(quantizer: Quantizer, rows: Tensor, noise: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
    """Return which indices (n,) of rows (n, C) are accepted; `noise` (n,) bounds the error of their rows."""
    z, noise = _projected(rows, noise, quantizer.input_projection())
    codebooks, channels = quantizer.codebooks(), quantizer.channels()
    if channels:
        return _scalar(channels, z, noise, ours, theirs)
    if len(codebooks) != 1 or codebooks[0].used is not None:
        # A position in a remap may stand for any code outside it.
        return torch.zeros(len(rows), dtype=torch.bool)
    problem = codebooks[0].search_problem()
    codes, is_code = problem.codes.double(), (theirs >= 0) & (theirs < len(problem.codes))
    theirs = torch.where(is_code, theirs, 0)
    winner, other = codes[ours], codes[theirs]
    z, longest = z.double(), torch.maximum(winner.norm(dim=1), other.norm(dim=1))
    if problem.objective is Objective.L2:
        gap = (z - other).square().sum(dim=1) - (z - winner).square().sum(dim=1)
        # float32 searches compute the expanded form, so the error grows with the squared norms, not the distance.
        lost = _LOSS * (z.norm(dim=1) + longest).square() + 2 * noise * (winner - other).norm(dim=1)
    else:
        gap = (z * (winner - other)).sum(dim=1)
        lost = _LOSS * z.norm(dim=1) * longest + noise * (winner - other).norm(dim=1)
    if problem.bias is not None:
        bias = problem.bias.double()
        gap = gap + bias[ours] - bias[theirs]
        lost = lost + _LOSS * torch.maximum(bias[ours].abs(), bias[theirs].abs())
    accepted: Tensor = is_code & (ours != theirs) & (gap <= lost)
    return accepted


def _scalar(channels: Sequence[Channel], z: Tensor, noise: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
    num_codes = math.prod(len(channel.values) for channel in channels)
    excused = (ours != theirs) & (theirs >= 0) & (theirs < num_codes)
    for number, channel in enumerate(channels):
        levels = len(channel.values)
        there = (theirs // channel.weight) % levels
        # tanh is flat at the outer levels: there the error in its argument grows with the number of levels.
        x = z[:, number].double()
        room = _LOSS * (x.abs() + levels) + noise
        jumps = torch.from_numpy(channel.boundaries)
        excused &= torch.searchsorted(jumps, x - room) <= there
        excused &= there <= torch.searchsorted(jumps, x + room)
    return excused


def _stages(module: ResidualPart, rows: Tensor, ours: Tensor, theirs: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the position of every stage, and which of its indices (n,) are accepted."""
    frozen: FrozenPart = module.frozen(torch.device("cpu"), "auto")
    residual = rows[:, module.part.start : module.part.stop]
    residual, noise = _projected(residual, rows.new_zeros(len(rows), dtype=torch.float64), frozen.projection)
    has_differed = is_accepted = torch.zeros(len(rows), dtype=torch.bool)
    for stage, table, place in zip(module.codebooks(), frozen.stages, module.part.places, strict=True):
        if frozen.normalizes:
            length = residual.double().norm(dim=1).clamp_min(LEAST_LENGTH)
            # An error of the residual turns its direction and changes its length.
            residual, noise = frozen.searched(residual), 2 * noise / length + _LOSS
        mine, yours = ours[:, place], theirs[:, place]
        first = (mine != yours) & ~has_differed
        is_accepted = is_accepted | (first & _single(stage, residual, noise, mine, yours))
        has_differed = has_differed | (mine != yours)
        yield place, is_accepted & (mine != yours)
        decoded = table.decode_rows(mine)
        residual = residual - decoded
        # Both the decoded row and the difference are rounded.
        noise = noise + _LOSS * decoded.double().norm(dim=1)


def _projected(rows: Tensor, noise: Tensor, projection: Projection | None) -> tuple[Tensor, Tensor]:
    if projection is None:
        return rows, noise
    # The Frobenius norm bounds the factor by which the projection scales a norm.
    largest = projection[0].double().norm()
    noise = largest * (noise + _LOSS * rows.double().norm(dim=1)) + _LOSS * projection[1].double().norm()
    return project(rows.contiguous(), projection), noise
