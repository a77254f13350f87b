"""Verification of an import: our indices of latents against the indices of the model's own code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vqserve_server.errors import ForeignCheckpointError, InvalidArgument
from vqserve_server.quantizers import Quantizer
from vqserve_tools.importing.foreign import UNNAMED, open_foreign
from vqserve_tools.importing.near_ties import near_ties


@dataclass(frozen=True)
class Verification:
    """Result of a comparison of indices.

    Attributes:
        total: number of compared indices.
        different: number of indices that differ.
        near_ties: number of differing indices that float32 cannot decide, or that follow from such an index in an
            earlier stage.
        first: text about the first difference, if possible one that is not a near-tie; "" without differences.
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
    """Compare a quantizer's indices of latents with the expected indices.

    Args:
        quantizer: quantizer with its layout set.
        latents: .npy file of 2 to 5 axes.
        indices: .npy file with the shape of `Quantizer.encode`'s result.

    Raises:
        ForeignCheckpointError: a file cannot be read or does not fit, or indices differ by more than near-ties.
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
    """Compare a quantizer's indices of latents with the expected indices.

    Args:
        quantizer: quantizer with its layout set.
        latents: floating-point numbers, 2 to 5 axes.
        indices: integers, with the shape of `Quantizer.encode`'s result.
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
    if indices.shape != tuple(ours.shape):
        raise ForeignCheckpointError(
            f"--verify: {names[1]} has shape {indices.shape}, the latents' indices have {tuple(ours.shape)}"
        )
    theirs = torch.from_numpy(indices.astype(np.int64))
    differs = ours != theirs
    different = int(differs.sum())
    if not different:
        return Verification(ours.numel(), 0, 0, "")
    near = near_ties(quantizer, z, ours, theirs)
    shown = differs & ~near if bool((differs & ~near).any()) else differs
    position = torch.nonzero(shown)[0].tolist()
    first = f"{position} is {int(ours[tuple(position)])} here and {int(theirs[tuple(position)])} there"
    return Verification(ours.numel(), different, int((differs & near).sum()), first)


def _array(path: Path) -> npt.NDArray[Any]:
    with open_foreign(path) as arrays:
        if UNNAMED not in arrays:
            raise ForeignCheckpointError(f"--verify: {path.name} holds arrays by name: it should be one .npy")
        return arrays[UNNAMED].read()
