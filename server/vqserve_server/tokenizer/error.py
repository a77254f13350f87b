"""The quantization error of rows: how far they are from the codes that were chosen for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vqserve_server.device import to_device, to_host
from vqserve_server.quantizers import FrozenQuantizer, Quantizer
from vqserve_server.quantizers.comparison import Comparison


class CodeErrors:
    """Measures errors in the space in which the codebook compares rows and codes (`Comparison`).

    Attributes:
        space: name of that space.
    """

    def __init__(self, quantizer: Quantizer, frozen: FrozenQuantizer) -> None:
        """Take a quantizer whose codes approximate latents (`is_approximate`), and its frozen form."""
        self._comparison = Comparison(quantizer, frozen)
        self._decodable = frozen.decodable
        self._has_stages = quantizer.has_stages
        self._device = frozen.device
        self.space = self._comparison.name

    @torch.no_grad()
    def of(self, rows: npt.NDArray[np.floating[Any]], indices: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
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
        found = to_device(chosen if self._has_stages else chosen[:, 0], self._device)
        wanted = self._comparison.wanted(to_device(rows, self._device))
        errors: npt.NDArray[np.float64] = to_host((self._comparison.found(found) - wanted).square().mean(dim=1)).numpy()
        return np.where(stands_for_code, errors, np.nan)
