"""Memory in which the rows of batches are put together, kept from one batch to the next."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vqserve_server.engine.job import Key


class Staging:
    """The memory of one device thread.

    Fresh memory is zeroed by the kernel page by page, which takes longer than copying rows into it. For CUDA it is
    page-locked, so that the copy to the device need not be waited for.
    """

    def __init__(self) -> None:
        self._memory: dict[bool, npt.NDArray[np.uint8]] = {}

    def rows(self, key: Key, count: int) -> npt.NDArray[Any]:
        """Return room for that many rows of a key; it is good until the next call."""
        shape, dtype = key.rows_shape(count), key.rows_dtype
        nbytes = math.prod(shape) * dtype.itemsize
        is_pinned = key.tokenizer.device.type == "cuda"
        memory = self._memory.get(is_pinned)
        if memory is None or memory.nbytes < nbytes:
            # A power of two: it is not to grow with every batch that is a little larger.
            memory = torch.empty(1 << (nbytes - 1).bit_length(), dtype=torch.uint8, pin_memory=is_pinned).numpy()
            self._memory[is_pinned] = memory
        return memory[:nbytes].view(dtype).reshape(shape)
