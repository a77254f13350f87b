"""Verification of an import: our indices of latents against the indices of the model's own code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vqserve.errors import ForeignCheckpointError, InvalidArgument
from vqserve.layout import Layout
from vqserve_server.quantizers import Quantizer
from vqserve_server.quantizers.tensors import layout_of, to_rows
from vqserve_tools.importing.files import UNNAMED, open_foreign
from vqserve_tools.importing.near_ties import near_ties
from vqserve_tools.importing.reasons import Reason, find_reason


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
    if not latents.any():
        raise ForeignCheckpointError(f"--verify: {names[0]} holds only zeros, which do not tell one code from another")
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
