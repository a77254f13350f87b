"""A quantizer beside latents and the indices that somebody else's code gave them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vqserve.layout import channel_axis
from vqserve_server.codebooks.foreign import UNNAMED, open_foreign
from vqserve_server.errors import ForeignCheckpointError, InvalidRequest
from vqserve_server.quantizers import AbstractQuantizer, Quantizer, ResidualQuantizer
from vqserve_server.quantizers.dtypes import widen
from vqserve_server.quantizers.frozen_residual import FrozenPart
from vqserve_server.quantizers.projections import ProjectedModule, project
from vqserve_server.quantizers.residual import ResidualPart
from vqserve_server.quantizers.rows import layout_of, to_rows
from vqserve_server.quantizers.scalar import ScalarQuantizer
from vqserve_server.search import Objective

# What float32 may lose of a distance or a product whose parts are of size 1, with room for sums of some hundred terms.
_FLOAT32_LOSS = 2.0**-20
# Of more differences than these the first ones are looked at: they are no near-ties.
_MAX_DIFFERENCES = 1 << 14


@dataclass(frozen=True)
class Verification:
    """How many indices agree.

    Attributes:
        total: indices compared.
        different: of them, those that differ.
        near_ties: of those, the ones that float32 cannot tell apart, or that follow from such a one in an earlier
            stage.
        first: the first difference that is none, or else the first, for people; "" if there is none at all.
    """

    total: int
    different: int
    near_ties: int
    first: str

    @property
    def holds(self) -> bool:
        """Whether all differences are near-ties."""
        return self.different == self.near_ties

    def __str__(self) -> str:
        text = f"{self.total - self.different} of {self.total} indices agree"
        if not self.different:
            return text
        others = f"of the {self.different} others {self.near_ties} are near-ties"
        return f"{text}; {others} (ours is as near or nearer in float64, by less than float32 can tell); {self.first}"


def verify_files(quantizer: Quantizer, latents: Path, indices: Path) -> Verification:
    """Compare what a quantizer makes of latents with the indices beside them.

    Args:
        quantizer: with its layout set.
        latents: a .npy file of 2 to 5 axes.
        indices: a .npy file with the shape of `Quantizer.encode`'s result.

    Raises:
        ForeignCheckpointError: a file cannot be read, does not fit, or holds other indices than near-ties explain.
    """
    outcome = verify(quantizer, _array(latents), _array(indices), names=(latents.name, indices.name))
    if not outcome.holds:
        raise ForeignCheckpointError(
            f"--verify: {outcome}: the metric, the layout or another option is not the model's; nothing was written"
        )
    return outcome


def verify(
    quantizer: Quantizer,
    latents: npt.NDArray[Any],
    indices: npt.NDArray[Any],
    *,
    names: tuple[str, str] = ("latents", "indices"),
) -> Verification:
    """Compare what a quantizer makes of latents with given indices.

    Args:
        quantizer: with its layout set.
        latents: floating-point numbers, of 2 to 5 axes.
        indices: integers, with the shape of `Quantizer.encode`'s result.
        names: what a message calls the two.

    Raises:
        ForeignCheckpointError: they do not fit the quantizer or each other.
    """
    if latents.dtype.kind != "f" or latents.dtype.itemsize > 8:
        raise ForeignCheckpointError(f"--verify: {names[0]} is {latents.dtype}: latents are floating-point numbers")
    z = torch.from_numpy(np.ascontiguousarray(latents, latents.dtype.newbyteorder("=")))
    try:
        ours = quantizer.encode(z)
    except InvalidRequest as error:
        raise ForeignCheckpointError(f"--verify: {names[0]}: {error}") from None
    if indices.dtype.kind not in "iu":
        raise ForeignCheckpointError(f"--verify: {names[1]} is {indices.dtype}: indices are integers")
    if indices.shape != tuple(ours.shape):
        raise ForeignCheckpointError(
            f"--verify: {names[1]} has shape {indices.shape}, the latents' indices have {tuple(ours.shape)}"
        )
    theirs = torch.from_numpy(indices.astype(np.int64))
    differs = ours != theirs
    different = int(differs.sum())
    if not different:
        return Verification(ours.numel(), 0, 0, "")
    near = _near_ties(quantizer, z, ours, theirs)
    told = differs & ~near if bool((differs & ~near).any()) else differs
    position = torch.nonzero(told)[0].tolist()
    first = f"{position} is {int(ours[tuple(position)])} here and {int(theirs[tuple(position)])} there"
    return Verification(ours.numel(), different, int((differs & near).sum()), first)


def _array(path: Path) -> npt.NDArray[Any]:
    with open_foreign(path) as arrays:
        if UNNAMED not in arrays:
            raise ForeignCheckpointError(f"--verify: {path.name} holds arrays by name: it should be one .npy")
        return arrays[UNNAMED].read()


def _near_ties(quantizer: Quantizer, z: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
    """Return which indices differ by no more than float32 may, shaped as the indices."""
    rows = widen(to_rows(z, quantizer.layout))
    if not isinstance(quantizer, ResidualQuantizer):
        differs = torch.nonzero((ours != theirs).reshape(-1))[:_MAX_DIFFERENCES, 0]
        near = torch.zeros(ours.numel(), dtype=torch.bool)
        near[differs] = _single(quantizer, rows[differs], ours.reshape(-1)[differs], theirs.reshape(-1)[differs])
        return near.reshape(ours.shape)
    axis = channel_axis(layout_of(ours.ndim, quantizer.layout)) % ours.ndim
    mine, yours = (to_rows(indices, quantizer.layout) for indices in (ours, theirs))
    differs = torch.nonzero((mine != yours).any(dim=1))[:_MAX_DIFFERENCES, 0]
    near = torch.zeros(mine.shape, dtype=torch.bool)
    near[differs] = _residual(quantizer, rows[differs], mine[differs], yours[differs])
    grid = [length for place, length in enumerate(ours.shape) if place != axis]
    return near.reshape(*grid, -1).movedim(-1, axis)


def _single(quantizer: nn.Module, rows: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
    if isinstance(quantizer, ScalarQuantizer):
        return _scalar(quantizer, _projected(quantizer, rows), ours, theirs)
    if not isinstance(quantizer, AbstractQuantizer) or quantizer.used is not None:
        # A position in a remap may stand for any code outside it.
        return torch.zeros(len(rows), dtype=torch.bool)
    problem = quantizer.search_problem()
    codes, known = problem.codes.double(), (theirs >= 0) & (theirs < len(problem.codes))
    z = _projected(quantizer, rows).double()
    ours_row, theirs_row = codes[ours], codes[torch.where(known, theirs, 0)]
    if problem.objective is Objective.L2:
        gap = (z - theirs_row).square().sum(dim=1) - (z - ours_row).square().sum(dim=1)
        # Expanded, as it is computed in float32: squares of the lengths, not of the distance.
        size = (z.norm(dim=1) + torch.maximum(ours_row.norm(dim=1), theirs_row.norm(dim=1))).square()
    else:
        gap = (z * (ours_row - theirs_row)).sum(dim=1)
        size = z.norm(dim=1) * torch.maximum(ours_row.norm(dim=1), theirs_row.norm(dim=1))
        if problem.bias is not None:
            bias = problem.bias.double()
            there = bias[torch.where(known, theirs, 0)]
            gap, size = gap + bias[ours] - there, size + torch.maximum(bias[ours].abs(), there.abs())
    near: Tensor = known & (gap <= _FLOAT32_LOSS * size)
    return near


def _scalar(quantizer: ScalarQuantizer, z: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
    near = (theirs >= 0) & (theirs < quantizer.num_codes)
    for number, channel in enumerate(quantizer.channels()):
        levels = len(channel.values)
        there = (theirs // channel.weight) % levels
        # tanh is flat at the outer levels: there float32 loses more of its argument, the more levels there are.
        x = z[:, number].double()
        room = _FLOAT32_LOSS * (x.abs() + levels)
        jumps = torch.from_numpy(channel.boundaries)
        lowest, highest = ((shifted[:, None] > jumps).sum(dim=1) for shifted in (x - room, x + room))
        near &= (lowest <= there) & (there <= highest)
    return near & (ours != theirs)


def _residual(quantizer: ResidualQuantizer, rows: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
    near = torch.zeros(ours.shape, dtype=torch.bool)
    for part in quantizer.parts:
        if isinstance(part, ResidualPart):
            for place, found in _stages(part, rows, ours, theirs):
                near[:, place] = found
    return near


def _stages(module: ResidualPart, rows: Tensor, ours: Tensor, theirs: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Give every stage's place, and whether its difference is a near-tie or follows from one."""
    frozen: FrozenPart = module.frozen(torch.device("cpu"), "auto")
    residual = rows[:, module.part.start : module.part.stop]
    if frozen.projection is not None:
        residual = project(residual.contiguous(), *frozen.projection, grid=rows.shape[:1])
    follows = torch.zeros(len(rows), dtype=torch.bool)
    parted = torch.zeros(len(rows), dtype=torch.bool)
    for stage, table, place in zip(module.stages, frozen.stages, module.part.places, strict=True):
        mine, yours = ours[:, place], theirs[:, place]
        # After the first difference theirs had another residual: what it makes of that is not looked at.
        first = (mine != yours) & ~parted
        follows |= first & _single(stage, residual, mine, yours)
        parted |= mine != yours
        yield place, follows & parted & (mine != yours)
        residual = residual - table.decode_rows(mine)


def _projected(quantizer: nn.Module, rows: Tensor) -> Tensor:
    projection = quantizer.input_projection() if isinstance(quantizer, ProjectedModule) else None
    return rows if projection is None else project(rows.contiguous(), *projection, grid=rows.shape[:1])
