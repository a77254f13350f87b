"""The interface of a family of checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from vqserve_tools.importing.families.checkpoint import Checkpoint
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.files import ForeignArray


@dataclass(frozen=True)
class Reading:
    """A quantizer as a family reads it from a checkpoint.

    Attributes:
        family: name of the family for messages, such as "DAC".
        kind: kind of the quantizer.
        arguments: known arguments of the quantizer's constructor.
        tensors: state dict of the quantizer, float32; `used` is int64.
    """

    family: str
    kind: str
    arguments: Mapping[str, object]
    tensors: Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Family:
    """A group of checkpoints with the same keys.

    Attributes:
        name: name for messages.
        places: function that returns the prefixes of the family's quantizers, each "" or ending in a dot.
        read: function that reads the quantizer of a checkpoint at such a prefix.
        kind: kind that has no codes, only options and perhaps projections: --kind names it, and a file is optional;
            None for a family with codes.
        in_model: whether the place is a module of a whole model, not the quantizer's own: what is beside the codes may
            be left, except what has the name of a part of a quantizer.
    """

    name: str
    places: Callable[[Mapping[str, ForeignArray]], Set[str]]
    read: Callable[[Checkpoint, Options], Reading]
    kind: str | None = None
    in_model: bool = False
