"""Which indices of a model's own code differ from ours because of float32's rounding only.

Libraries search in float32, where rounding can swap two codes at nearly the same distance. Our index is the exact
winner. Another index is accepted as a near-tie if its float64 gap to the winner is below the float32 error bound of the
search and of the projections and residuals before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from vqserve.layout import grid_shape
from vqserve_server.quantizers import Quantizer, ResidualFiniteScalarQuantizer
from vqserve_server.quantizers.inference.residual import LEAST_LENGTH, FrozenPart
from vqserve_server.quantizers.inference.scalar import Channel
from vqserve_server.quantizers.projections import Projection, project
from vqserve_server.quantizers.residual import ResidualPart
from vqserve_server.quantizers.residual_scalar import ScalarPart
from vqserve_server.quantizers.tensors import from_rows, layout_of, to_rows, widen
from vqserve_server.search import Objective

# Error bound of a float32 sum of products whose factors have norm 1, for up to some hundred terms.
_LOSS = 2.0**-20
# At most this many differences are examined; if there are more, most of them are no near-ties.
_MAX_DIFFERENCES = 1 << 14


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
    for places, steps in _chains(quantizer, rows[differs], mine[differs]):
        has_differed = is_accepted = torch.zeros(len(differs), dtype=torch.bool)
        for place, accepts in zip(places, steps, strict=True):
            ours_here, theirs_here = mine[differs, place], yours[differs, place]
            differs_here = ours_here != theirs_here
            is_accepted = is_accepted | (differs_here & ~has_differed & accepts(ours_here, theirs_here))
            has_differed = has_differed | differs_here
            near[differs, place] = is_accepted & differs_here
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
        # tanh is flat at the outer levels: there the error in its argument grows with the number of levels. The values
        # of a later stage are closer together.
        x = z[:, number].contiguous().double()
        room = _LOSS * (x.abs() + levels * float(channel.values.max())) + noise
        jumps = torch.from_numpy(channel.boundaries).contiguous()
        excused &= torch.searchsorted(jumps, x - room) <= there
        excused &= there <= torch.searchsorted(jumps, x + room)
    return excused


def _chains(
    quantizer: Quantizer, rows: Tensor, ours: Tensor
) -> Iterator[tuple[Sequence[int], Iterator[Callable[[Tensor, Tensor], Tensor]]]]:
    """Yield, for each chain of stages, the positions of its indices, and a judge of each stage.

    A judge takes our indices and theirs (n,), and returns which are accepted.
    """
    for module in quantizer.chains():
        yield module.part.places, _searched(module, rows, ours)
    if isinstance(quantizer, ResidualFiniteScalarQuantizer):
        for part in quantizer.chain_modules():
            yield part.part.places, _rounded(quantizer, part, rows, ours)


def _searched(module: ResidualPart, rows: Tensor, ours: Tensor) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    frozen: FrozenPart = module.frozen(torch.device("cpu"), "auto")
    residual = rows[:, module.part.start : module.part.stop]
    residual, noise = _projected(residual, rows.new_zeros(len(rows), dtype=torch.float64), frozen.projection)
    for stage, table, place in zip(module.codebooks(), frozen.stages, module.part.places, strict=True):
        if frozen.normalizes:
            length = residual.double().norm(dim=1).clamp_min(LEAST_LENGTH)
            # An error of the residual turns its direction and changes its length.
            residual, noise = frozen.searched(residual), 2 * noise / length + _LOSS
        yield partial(_single, stage, residual, noise)
        decoded = table.decode_rows(ours[:, place])
        residual, noise = _subtracted(residual, noise, decoded)


def _rounded(
    quantizer: ResidualFiniteScalarQuantizer, module: ScalarPart, rows: Tensor, ours: Tensor
) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    residual = rows[:, module.part.start : module.part.stop].contiguous()
    residual, noise = _projected(residual, rows.new_zeros(len(rows), dtype=torch.float64), module.input_projection())
    bound = quantizer.first_bound(torch.device("cpu"))
    if bound is not None:
        # The bound's slope is at most half the number of levels, and its values are at most 1 and a little.
        most = max(quantizer.levels)
        noise = most * (noise + _LOSS * residual.double().abs().amax(dim=1)) + most * _LOSS
        residual = bound(residual)
    for channels, place in zip(quantizer.stages(), module.part.places, strict=True):
        yield partial(_scalar, channels, residual, noise)
        digits = [ours[:, place] // channel.weight % len(channel.values) for channel in channels]
        values = [torch.from_numpy(channel.values)[digit] for channel, digit in zip(channels, digits, strict=True)]
        residual, noise = _subtracted(residual, noise, torch.stack(values, dim=1))


def _subtracted(residual: Tensor, noise: Tensor, decoded: Tensor) -> tuple[Tensor, Tensor]:
    # Both the decoded row and the difference are rounded.
    return residual - decoded, noise + _LOSS * decoded.double().norm(dim=1)


def _projected(rows: Tensor, noise: Tensor, projection: Projection | None) -> tuple[Tensor, Tensor]:
    if projection is None:
        return rows, noise
    # The Frobenius norm bounds the factor by which the projection scales a norm.
    largest = projection[0].double().norm()
    noise = largest * (noise + _LOSS * rows.double().norm(dim=1)) + _LOSS * projection[1].double().norm()
    return project(rows.contiguous(), projection), noise
