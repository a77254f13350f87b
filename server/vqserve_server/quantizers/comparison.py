"""The space in which tokens and codes are compared; not every kind decodes to approximations of its latents."""

from __future__ import annotations

import torch
from torch import Tensor

from vqserve_server.quantizers.inference.base import FrozenQuantizer
from vqserve_server.quantizers.projections import on_device, project
from vqserve_server.quantizers.quantizer import Quantizer


class Comparison:
    """Tokens and their codes in the space where the two can be compared.

    Attributes:
        name: name of the space. "latents": latents and decoded latents, if both have the same channels. The others
            follow the projection to the width of the codes, if there is one: "projected latents" and code rows;
            "directions", both scaled to length one, if lengths do not affect the search; "bounded latents" and codes
            of FSQ.
    """

    def __init__(self, quantizer: Quantizer, frozen: FrozenQuantizer) -> None:
        """Take a quantizer whose codes approximate latents (`is_approximate`), and its frozen form."""
        self._frozen = frozen
        # Only these kinds bound their channels; the others need not be kept.
        self._bounded = quantizer.bounded if quantizer.code_space == "bounded latents" else None
        inner, outer = quantizer.input_projection(), quantizer.output_projection()
        self._projection = on_device(inner, frozen.device)
        self.name = _name(quantizer, is_projected=inner is not None, is_projected_back=outer is not None)

    def wanted(self, rows: Tensor) -> Tensor:
        """Return the exact values of tokens in this space, (n, width) float64.

        Args:
            rows: (n, C) float32 or float64 on the device, finite.

        Raises:
            NonFiniteLatents: the projection overflows float32.
        """
        if self.name == "latents":
            return rows.double()
        searched = project(rows, self._projection)
        if self.name == "directions":
            return _directions(searched.double())
        return searched.double() if self._bounded is None else self._bounded(searched)

    def found(self, indices: Tensor) -> Tensor:
        """Return the decoded values of indices in this space, (n, width) float64.

        Args:
            indices: int64 indices from `encode_rows`, or the first q of each token.
        """
        if self.name == "latents":
            return self._frozen.decode_rows(indices).double()
        codes = self._frozen.decode_rows(indices, output="code_rows").double()
        return _directions(codes) if self.name == "directions" else codes


def _directions(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1, eps=torch.finfo(torch.float64).tiny)


def _name(quantizer: Quantizer, *, is_projected: bool, is_projected_back: bool) -> str:
    if is_projected and is_projected_back and quantizer.input_dim == quantizer.output_dim:
        return "latents"
    if quantizer.code_space != "latents":
        return quantizer.code_space
    return "projected latents" if is_projected or is_projected_back else "latents"
