"""The quantization error of rows on the codebook's device."""

from __future__ import annotations

import torch

from vqserve_server.device import to_device, to_host
from vqserve_server.quantizers import FrozenQuantizer, Quantizer
from vqserve_server.quantizers.comparison import Comparison
from vqserve_server.tokenizer.error import CodeErrors, Float64s, Ints, Rows


class DeviceErrors(CodeErrors):
    """Of any codebook whose codes approximate latents."""

    def __init__(self, quantizer: Quantizer, frozen: FrozenQuantizer) -> None:
        """Take a quantizer whose codes approximate latents (`is_approximate`), and its frozen form."""
        self._comparison = Comparison(quantizer, frozen)
        super().__init__(self._comparison.name, decodable=frozen.decodable, has_stages=quantizer.has_stages)
        self._device = frozen.device

    @torch.no_grad()
    def _mean_squares(self, rows: Rows, indices: Ints) -> Float64s:
        found = self._comparison.found(to_device(indices, self._device))
        wanted = self._comparison.wanted(to_device(rows, self._device))
        errors: Float64s = to_host((found - wanted).square().mean(dim=1)).numpy()
        return errors
