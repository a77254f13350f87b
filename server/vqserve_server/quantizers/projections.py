"""Projections around a codebook, as exact values rounded once to float32."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn

from vqserve.errors import CodebookError, TokenBeyondRange
from vqserve_server.quantizers.tensors import check_size, widen
from vqserve_server.search.rounding import affine

Projection: TypeAlias = tuple[Tensor, Tensor]
"""Weight (D, C) and bias (D,)."""

# Far more than the roundings of a sum of any length that fits a codebook.
_ROOM = 1.0 + 2.0**-10


class ProjectedModule(nn.Module):
    """A module with an input projection before the search and an output projection after it; both are optional.

    State: `proj_in.weight` (D, C), `proj_in.bias` (D,), `proj_out.weight` (O, D), `proj_out.bias` (O,).

    Attributes:
        proj_in: the input projection, or nn.Identity.
        proj_out: the output projection, or nn.Identity.
    """

    proj_in: nn.Linear | nn.Identity
    proj_out: nn.Linear | nn.Identity

    @property
    def projected_input_dim(self) -> int | None:
        """Channels that `proj_in` takes; None: there is no projection."""
        return None if isinstance(self.proj_in, nn.Identity) else self.proj_in.in_features

    @property
    def projected_output_dim(self) -> int | None:
        """Channels that `proj_out` gives; None: there is no projection."""
        return None if isinstance(self.proj_out, nn.Identity) else self.proj_out.out_features

    def input_projection(self) -> Projection | None:
        """Return weight (D, C) and bias (D,) of `proj_in`, detached, in at least float32, finite; None: there is none.

        Raises:
            CodebookError: proj_in holds NaN or infinity.
        """
        return _operands(self.proj_in, "proj_in")

    def output_projection(self) -> Projection | None:
        """Return weight (O, D) and bias (O,) of `proj_out`, likewise.

        Raises:
            CodebookError: proj_out holds NaN or infinity.
        """
        return _operands(self.proj_out, "proj_out")

    def output_rows(self, code_rows: Tensor) -> Tensor:
        """Return proj_out of code rows (N, D): (N, O) of their type, each the exact value rounded once to float32.

        Raises:
            CodebookError: a code row or proj_out holds NaN or infinity.
        """
        projection = self.output_projection()
        if projection is None:
            return code_rows
        rows = widen(code_rows)
        if not bool(torch.isfinite(rows).all()):
            raise CodebookError("the codes hold NaN or infinity: nothing can be decoded")
        return affine(rows, *projection).to(code_rows.dtype)


def projection(name: str, inputs: int | None, outputs: int | None) -> nn.Linear | nn.Identity:
    """Return a linear layer, drawn as torch draws it; the identity where one of its sides is None.

    Raises:
        InvalidOption: a side is not a positive integer.
    """
    if inputs is None or outputs is None:
        return nn.Identity()
    for size in (inputs, outputs):
        check_size(name, size)
    return nn.Linear(inputs, outputs)


def on_device(projection: Projection | None, device: torch.device) -> Projection | None:
    """Return a projection on a device."""
    return None if projection is None else (projection[0].to(device), projection[1].to(device))


def project(rows: Tensor, projection: Projection | None) -> Tensor:
    """Return rows (N, C) @ weight.T + bias, (N, D) float32, each element the exact value rounded once.

    Args:
        rows: (N, C) float32 or float64, finite.
        projection: weight (D, C) and bias (D,), finite; None is the identity, which rounds nothing.

    Raises:
        TokenBeyondRange: a token's projection leaves float32's range; its `row` is the first such.
    """
    if projection is None:
        return rows
    projected = affine(rows, *projection)
    finite = torch.isfinite(projected).all(dim=1)
    if not bool(finite.all()):
        row = int(torch.nonzero(~finite)[0])
        raise TokenBeyondRange("the projection of {where} leaves the range of float32", array="tokens", row=row)
    return projected


def largest_projected(largest: Tensor, projection: Projection | None) -> Tensor:
    """Return bounds of what a projection makes of rows, sums rounded in whatever order included.

    Args:
        largest: (D,) float64, the greatest magnitude of each channel.
        projection: None is the identity.

    Returns:
        (O,) float64.
    """
    if projection is None:
        return largest
    weight, bias = projection
    return (weight.double().abs() @ largest + bias.double().abs()) * _ROOM


def _operands(layer: nn.Linear | nn.Identity, name: str) -> Projection | None:
    if isinstance(layer, nn.Identity):
        return None
    weight, bias = widen(layer.weight), widen(layer.bias)
    if not bool(torch.isfinite(weight).all() & torch.isfinite(bias).all()):
        raise CodebookError(f"{name} holds NaN or infinity: nothing can be {'en' if name == 'proj_in' else 'de'}coded")
    return weight, bias
