"""An array in an untrusted file, and the limits of its size and its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from vqserve.errors import ForeignCheckpointError

# Far more than the largest known codebook: 2^18 codes of width 256 are 256 MiB.
MAX_ARRAY_BYTES = 4 << 30
MAX_NAME_CHARACTERS = 4096
LONG_NAME = f"a name in it has more than {MAX_NAME_CHARACTERS} characters: it is not a model's state dict"
# Name of the only array of a file without names.
UNNAMED = ""


@dataclass(frozen=True)
class ForeignArray:
    """An array in a file that is not read yet.

    Attributes:
        shape: lengths of the axes.
        dtype: name of the element type: "float32", "bfloat16" and so on.
        read: returns the array; a type that numpy lacks comes widened to float32, which is exact.
        stored_as: the name under which the file has the data, if this is a second name of it; "" otherwise.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], npt.NDArray[Any]]
    stored_as: str = ""


def check_size(label: str, size: int) -> None:
    """Check that an array may be read.

    Raises:
        ForeignCheckpointError: it has more than MAX_ARRAY_BYTES.
    """
    if size > MAX_ARRAY_BYTES:
        raise ForeignCheckpointError(f"{label} is {size} bytes, more than {MAX_ARRAY_BYTES}")
