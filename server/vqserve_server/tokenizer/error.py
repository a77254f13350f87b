"""The quantization error of rows: how far they are from the codes that were chosen for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from vqserve_server.quantizers.declared import CodeSpace
from vqserve_server.quantizers.inference.served import Served

Rows = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]


class CodeErrors(ABC):
    """Measures errors in the space in which the codebook compares rows and codes (`Comparison`).

    Attributes:
        space: name of that space.
    """

    def __init__(self, space: str, *, decodable: int, has_stages: bool) -> None:
        self.space = space
        self._decodable = decodable
        self._has_stages = has_stages

    def of(self, rows: Rows, indices: Ints) -> Float64s:
        """Return the mean squared error of the channels of each row.

        Args:
            rows: (n, input_dim) float32 or float64, which `Tokenizer.encode_rows` has encoded.
            indices: (n, num_quantizers), all indices of each row.

        Returns:
            (n,): NaN where an index stands for no code (a remap's sentinel), infinite where float64 overflows.
        """
        # A sentinel occurs only where a token has one index.
        stands_for_code = np.all((indices >= 0) & (indices < self._decodable), axis=1)
        chosen = np.where(stands_for_code[:, None], indices, 0)
        errors = self._mean_squares(rows, chosen if self._has_stages else chosen[:, 0])
        return np.where(stands_for_code, errors, np.nan)

    @abstractmethod
    def _mean_squares(self, rows: Rows, indices: Ints) -> Float64s:
        """Return the mean squared error (n,) of rows and of indices that stand for codes, (n,) or (n, q)."""


class PlainErrors(CodeErrors):
    """Of a plain codebook, in numpy."""

    def __init__(self, served: Served, space: CodeSpace) -> None:
        """Take a plain codebook whose codes approximate latents, and the space in which they are compared."""
        super().__init__(space, decodable=served.sizes.decodable, has_stages=False)
        self._served = served

    def _mean_squares(self, rows: Rows, indices: Ints) -> Float64s:
        wanted = rows.astype(np.float64)
        found = self._served.decode_rows(indices, output="code_rows").astype(np.float64)
        if self.space == "directions":
            wanted, found = _directions(wanted), _directions(found)
        with np.errstate(over="ignore"):
            errors: Float64s = np.square(found - wanted).mean(axis=1)
        return errors


def _directions(rows: Float64s) -> Float64s:
    lengths: Float64s = np.sqrt(np.square(rows).sum(axis=1, keepdims=True))
    directions: Float64s = rows / np.maximum(lengths, np.finfo(np.float64).tiny)
    return directions
