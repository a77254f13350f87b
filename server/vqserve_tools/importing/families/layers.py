"""Linear layers of checkpoints: plain, as 1x1 convolutions, with weight norm, or without a bias."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from vqserve_server.search import rounding
from vqserve_tools.importing.families.checkpoint import Checkpoint, shape_text
from vqserve_tools.importing.families.family import Floats

# torch's names of the norms and directions of weight norm; the older pair first.
_NORMED = (("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1"))
# All names of arrays that a layer can have.
LAYER_NAMES = frozenset({"weight", "bias", *(name for pair in _NORMED for name in pair)})


@dataclass(frozen=True)
class Layer:
    """A linear layer: weight (outputs, inputs) and bias (outputs,)."""

    weight: Floats
    bias: Floats

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        return int(self.weight.shape[1])

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return int(self.weight.shape[0])


def has_layer(checkpoint: Checkpoint, name: str) -> bool:
    """Return whether there is a layer of this name."""
    return any(f"{name}.{end}" in checkpoint for end in ("weight", _NORMED[0][1], _NORMED[1][1]))


def read_layer(checkpoint: Checkpoint, name: str) -> Layer:
    """Take a layer. A missing bias becomes zeros; weight norm is computed exactly and rounded once.

    Weight norm has a norm for every output (torch's dim=0).

    Raises:
        ForeignCheckpointError: the layer is missing or damaged, or is a convolution over several elements.
    """
    normed = next((pair for pair in _NORMED if f"{name}.{pair[1]}" in checkpoint), None)
    if normed is None:
        weight = _matrix(checkpoint, f"{name}.weight")
    else:
        weight = _weight_norm(checkpoint, *(f"{name}.{end}" for end in normed))
    has_bias = f"{name}.bias" in checkpoint
    bias = checkpoint.floats(f"{name}.bias", rank=1, what="a bias has one axis") if has_bias else None
    if bias is not None and bias.shape != weight.shape[:1]:
        raise checkpoint.refusal(f"{checkpoint.prefix}{name}: its bias and weight do not belong together")
    return Layer(weight, np.zeros(len(weight), np.float32) if bias is None else bias)


def read_pair(checkpoint: Checkpoint, names: tuple[str, str]) -> tuple[Layer | None, Layer | None]:
    """Take the projections before and after the codes, or return (None, None) if the checkpoint has neither.

    Raises:
        ForeignCheckpointError: the checkpoint has only one of them.
    """
    there = [has_layer(checkpoint, name) for name in names]
    if not any(there):
        return None, None
    return read_layer(checkpoint, names[0]), read_layer(checkpoint, names[1])


def numbered(checkpoint: Checkpoint, module: str, names: Iterable[str]) -> list[Checkpoint]:
    """Return the views of `module.0.`, `module.1.` and so on, up to the greatest number in the names.

    Raises:
        ForeignCheckpointError: a number is missing.
    """
    matches = [re.match(rf"{re.escape(module)}\.(\d+)\.", name) for name in names]
    numbers = sorted({int(match[1]) for match in matches if match})
    if numbers != list(range(len(numbers))):
        missing = min(set(range(len(numbers))) - set(numbers))
        raise checkpoint.refusal(f"{checkpoint.prefix}{module}.{missing} is missing, and later ones are there")
    return [checkpoint.at(f"{module}.{number}.") for number in numbers]


def layer_names(names: Iterable[str]) -> set[str]:
    """Return all array names that layers of these names can have."""
    return {f"{name}.{end}" for name in names for end in LAYER_NAMES}


def _matrix(checkpoint: Checkpoint, name: str) -> Floats:
    values = checkpoint.floats(name)
    if values.ndim < 2 or math.prod(values.shape[2:]) != 1:
        raise checkpoint.refusal(
            f"{checkpoint.prefix}{name} has shape {shape_text(values.shape)}: a projection maps single elements"
        )
    return values.reshape(values.shape[:2])


def _weight_norm(checkpoint: Checkpoint, norm: str, direction: str) -> Floats:
    v = _matrix(checkpoint, direction)
    g = checkpoint.floats(norm)
    if g.shape != (len(v), *(1,) * (g.ndim - 1)):
        raise checkpoint.refusal(
            f"{checkpoint.prefix}{norm} has shape {shape_text(g.shape)}: it should have a norm for each output"
        )
    if not np.abs(v).max(axis=1, initial=0).all():
        raise checkpoint.refusal(f"{checkpoint.prefix}{direction} has an output of zeros, which has no direction")
    # rounding.weight_norm takes one norm per column.
    columns = torch.from_numpy(np.ascontiguousarray(v.T)), torch.from_numpy(g.reshape(1, -1))
    weight = rounding.weight_norm(*columns).numpy().T
    return np.ascontiguousarray(weight)
