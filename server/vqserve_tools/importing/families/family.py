"""What a family of checkpoints is to the importer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from vqserve_tools.importing.families.checkpoint import Checkpoint
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.foreign import ForeignArray

Floats: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Reading:
    """What a family makes of a checkpoint.

    Attributes:
        family: for people: "DAC".
        kind: of our quantizer.
        arguments: of its constructor, those that are known.
        tensors: of its state dict: float32, `used` int64.
    """

    family: str
    kind: str
    arguments: Mapping[str, object]
    tensors: Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Family:
    """A group of checkpoints that have their keys in common.

    Attributes:
        name: for people.
        places: returns the prefixes under which these names hold a quantizer of the family, each "" or ending in a dot.
        read: returns the quantizer of a checkpoint that begins at such a place.
    """

    name: str
    places: Callable[[Mapping[str, ForeignArray]], Set[str]]
    read: Callable[[Checkpoint, Options], Reading]
