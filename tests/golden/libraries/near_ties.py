"""Whether a library's token that is not ours is a near-tie: as good as ours but for what float32 can be off by.

A library's search is float32 throughout. The bounds here are those of that arithmetic, from Higham, *Accuracy and
stability of numerical algorithms*, 2002, chapter 3: a sum of n products is off by at most n u times the sum of their
magnitudes, u = 2^-24. Gaps between codes are exact: products of float32 numbers are exact in float64, and `math.fsum`
rounds their sum once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vqserve_server.quantizers import (
    LookupFreeQuantizer,
    Quantizer,
    ResidualFiniteScalarQuantizer,
    ResidualQuantizer,
    freeze,
)
from vqserve_server.quantizers.abstract import AbstractQuantizer
from vqserve_server.quantizers.inference.residual_scalar import FrozenResidualScalar
from vqserve_server.quantizers.projections import ProjectedModule, Projection
from vqserve_server.quantizers.scalar import ScalarQuantizer
from vqserve_server.search import Objective
from vqserve_server.search.rounding import affine

_U = 2.0**-24
# Roundings beside a sum's own: norms, quotients, a square root, weight norm.
_FEW = 8


class NoNearTie(AssertionError):
    """A library's index is worse than ours by more than float32 accounts for, or ours is not the best one."""


@dataclass(frozen=True)
class _Rows:
    """Latents or residuals (M, C) float32, and how far the library's own may be from them, elementwise, float64."""

    values: Tensor
    error: np.ndarray

    @classmethod
    def exactly(cls, values: Tensor) -> _Rows:
        return cls(values, np.zeros(values.shape))

    def projected(self, projection: Projection | None) -> _Rows:
        if projection is None:
            return self
        weight, bias = (np.abs(operand.double().numpy()) for operand in projection)
        scale = np.abs(self.values.double().numpy()) @ weight.T + bias
        error = self.error @ weight.T + (weight.shape[1] + _FEW) * _U * scale
        return _Rows(affine(self.values, *projection), error)

    def less(self, decoded: Tensor, error: np.ndarray) -> _Rows:
        values = self.values - decoded
        return _Rows(values, self.error + error)


def largest_share(quantizer: Quantizer, rows: Tensor, ours: np.ndarray, theirs: np.ndarray) -> float:
    """Follow the library stage by stage, and return the largest gap to our choice, as a share of what float32 explains.

    Every stage is judged on what the library's own earlier indices left of the latents, so that each of its indices
    is accounted for, also those after the first that is not ours.

    Args:
        quantizer: what was imported.
        rows: (M, C) float32.
        ours: (M, n_q), what we encode the rows to.
        theirs: (M, n_q), what the library does.

    Raises:
        NoNearTie: a gap is larger than float32 explains, or is negative: then ours was not the best one.
    """
    if isinstance(quantizer, ScalarQuantizer):
        return _largest_of_digits(quantizer, rows, ours[:, 0], theirs[:, 0])
    if isinstance(quantizer, ResidualFiniteScalarQuantizer):
        return _largest_of_residual_digits(quantizer, rows, theirs)
    if isinstance(quantizer, AbstractQuantizer):
        return _largest_of_stages([quantizer], _Rows.exactly(rows), ours, theirs)
    assert isinstance(quantizer, ResidualQuantizer)
    largest = 0.0
    for part in quantizer.parts:
        seen = _Rows.exactly(rows[:, part.part.start : part.part.stop]).projected(part.input_projection())
        places = list(part.part.places)
        largest = max(largest, _largest_of_stages(list(part.stages), seen, ours[:, places], theirs[:, places]))
    return largest


def _largest_of_stages(stages: Sequence[AbstractQuantizer], rows: _Rows, ours: np.ndarray, theirs: np.ndarray) -> float:
    largest = 0.0
    same_so_far = np.ones(len(ours), bool)
    for stage, our, their in zip(stages, ours.T, theirs.T, strict=True):
        best = stage.encode(rows.values).numpy()
        if not np.array_equal(best[same_so_far], our[same_so_far]):
            raise NoNearTie("the tokenizer gives another index than the quantizer does for the same residual")
        searched = rows.projected(stage.input_projection())
        for row in np.flatnonzero(best != their):
            largest = max(largest, _share(stage, searched, int(row), int(best[row]), int(their[row])))
        same_so_far &= best == their
        decoded, error = _decoded(stage, searched, torch.from_numpy(their))
        if len(stages) > 1:
            rows = rows.less(decoded, error)
    return largest


def _share(stage: AbstractQuantizer, searched: _Rows, row: int, best: int, other: int) -> float:
    problem = stage.search_problem()
    z = searched.values[row].double().numpy()
    a, b = (problem.codes[index].double().numpy() for index in (best, other))
    length, longest = np.linalg.norm(z), max(np.linalg.norm(a), np.linalg.norm(b))
    roundings = 2 * (len(z) + _FEW) * _U
    if problem.objective is Objective.L2:
        gap = math.fsum([*(b * b), *(-2 * z * b), *(-a * a), *(2 * z * a)])
        bound = roundings * (length + longest) ** 2 + 2 * searched.error[row] @ np.abs(a - b)
    else:
        biases = [0.0, 0.0] if problem.bias is None else [float(problem.bias[best]), -float(problem.bias[other])]
        gap = math.fsum([*(z * a), *(-z * b), *biases])
        # Four times: where the library searches unit vectors by |z|^2 - 2 z.e + |e|^2.
        bound = 4 * roundings * (length * longest + max(map(abs, biases))) + searched.error[row] @ np.abs(a - b)
    if not 0 <= gap <= bound or (gap == 0 and other < best):
        raise NoNearTie(f"code {other} is worse than code {best} by {gap:.3g}; float32 accounts for {bound:.3g}")
    return float(gap / bound)


def _decoded(stage: AbstractQuantizer, searched: _Rows, ids: Tensor) -> tuple[Tensor, np.ndarray]:
    """Return what a stage decodes indices to, and how far the library's may be from it."""
    codes = stage.code_rows()[ids]
    projection = stage.output_projection() if isinstance(stage, ProjectedModule) else None
    if projection is None:
        return codes, np.zeros(codes.shape)
    # DAC projects z + (code - z), the straight-through value, in eval too.
    detour = 2 * _U * (np.abs(searched.values.double().numpy()) + np.abs(codes.double().numpy())) + searched.error * _U
    out = _Rows(codes, detour).projected(projection)
    return out.values, out.error


def _largest_of_digits(quantizer: ScalarQuantizer, rows: Tensor, ours: np.ndarray, theirs: np.ndarray) -> float:
    searched = _Rows.exactly(rows).projected(quantizer.input_projection())
    values = searched.values.double().numpy()
    largest = 0.0
    for place, channel in enumerate(quantizer.channels()):
        levels = len(channel.values)
        our, their = (index.astype(np.int64) // channel.weight % levels for index in (ours, theirs))
        if not np.array_equal(our, (values[:, place, None] > channel.boundaries).sum(1)):
            raise NoNearTie(f"channel {place}: a digit of ours is on the wrong side of a boundary")
        for row in np.flatnonzero(our != their):
            z, boundary = values[row, place], channel.boundaries[min(our[row], their[row])]
            bound = searched.error[row, place]
            if not isinstance(quantizer, LookupFreeQuantizer):
                # tanh is off by a few u, and its slope at the outermost boundaries is about 1 / L.
                bound += 2 * _FEW * _U * levels + 2 * _U * abs(z)
            if abs(int(our[row]) - int(their[row])) != 1 or not abs(z - boundary) <= bound:
                raise NoNearTie(f"channel {place} is {z:.9g}, and the digit changes at {boundary:.9g}")
            largest = max(largest, float(abs(z - boundary) / bound))
    return largest


def _largest_of_residual_digits(quantizer: ResidualFiniteScalarQuantizer, rows: Tensor, theirs: np.ndarray) -> float:
    frozen = freeze(quantizer, device="cpu")
    assert isinstance(frozen, FrozenResidualScalar)
    levels = np.array(quantizer.levels)
    largest = 0.0
    for part in frozen._parts:
        searched = _Rows.exactly(rows[:, part.part.start : part.part.stop]).projected(part.projection)
        residual, error = searched.values, searched.error
        if part.first_bound is not None:
            # Its slope is at most half the levels.
            residual, error = part.first_bound(residual), error * levels / 2
        for stage, place in zip(part.stages, part.part.places, strict=True):
            # tanh is off by a few u, here or in the bound before, and so are quotients and differences.
            error = error + 2 * _FEW * _U * (levels + residual.abs().numpy())
            our, values = stage.digits(residual).numpy().T, residual.double().numpy()
            their = theirs[:, place, None] // stage._weights.numpy() % levels
            for row, channel in np.argwhere(our != their):
                low, high = sorted((our[row, channel], their[row, channel]))
                gap = abs(float(stage._boundaries[channel, low]) - values[row, channel])
                if high - low != 1 or not gap <= error[row, channel]:
                    raise NoNearTie(f"channel {channel} is {gap:.3g} from the boundary of its digit")
                largest = max(largest, gap / error[row, channel])
            residual = residual - stage.values_of(torch.from_numpy(their.T.astype(np.int64)))
    return largest
