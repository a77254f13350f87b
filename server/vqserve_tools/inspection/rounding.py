"""Tokens that would change if latents or codebook were stored in half precision."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from vqserve.dtypes import LATENTS
from vqserve.errors import CodebookError, NonFiniteLatents
from vqserve_server.quantizers import FrozenQuantizer, Quantizer, freeze
from vqserve_server.quantizers.tensors import narrow

# The cases that are compared: the fields of `Rounded`.
_WHAT = ("latents", "codebook", "both")
DTYPES: dict[str, torch.dtype] = {
    dtype.name: getattr(torch, dtype.name) for dtype in LATENTS if dtype.storage.itemsize < 4
}


@dataclass(frozen=True, kw_only=True)
class Changed:
    """Tokens that would change.

    Attributes:
        tokens: number of tokens with at least one index that changes.
        share: `tokens` as a fraction of all tokens.
        indices: for each index position of a token, the number of tokens whose index changes.
        lost: number of tokens that cannot be encoded any more because a number overflows; `tokens` includes them.
    """

    tokens: int
    share: float
    indices: tuple[int, ...]
    lost: int


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """Changes caused by rounding to one type; the search stays exact.

    Attributes:
        latents: changes if the latents are rounded.
        codebook: changes if all tensors of the codebook file are rounded; None: a rounded number would overflow.
        both: changes if both are rounded; None as for `codebook`.
    """

    latents: Changed
    codebook: Changed | None
    both: Changed | None


class RoundingTally:
    """Encodes tokens with rounded latents and codebooks, and counts the changes."""

    def __init__(self, quantizer: Quantizer, frozen: FrozenQuantizer, dtype: torch.dtype) -> None:
        """Start with no tokens, for a quantizer, its frozen form and the type to round to."""
        self._frozen = frozen
        self._rounded = _round(quantizer, frozen, dtype)
        self._dtype = dtype
        self._tokens = 0
        self._changed = {name: torch.zeros(frozen.num_quantizers + 2, dtype=torch.int64) for name in _WHAT}

    def add(self, rows: Tensor, indices: Tensor) -> None:
        """Count tokens.

        Args:
            rows: (n, C) float32 or float64 on the device, finite.
            indices: (n, q) int64, indices of the unrounded rows.
        """
        narrowed = narrow(rows, self._dtype).to(rows.dtype)
        if torch.equal(narrowed, rows):
            narrowed = rows
        self._tokens += len(rows)
        # If rounding changed neither codebook nor rows, the indices are known.
        known = {(id(self._frozen), id(rows)): indices}
        inputs = {
            "latents": (self._frozen, narrowed),
            "codebook": (self._rounded, rows),
            "both": (self._rounded, narrowed),
        }
        for name, (frozen, latents) in inputs.items():
            if frozen is None:
                continue
            key = id(frozen), id(latents)
            if key not in known:
                known[key] = _indices(frozen, latents)
            is_changed = known[key] != indices
            lost = known[key][:, 0] < 0
            counts = torch.cat([is_changed.any(dim=1, keepdim=True), lost[:, None], is_changed], dim=1)
            self._changed[name] += counts.sum(dim=0).cpu()

    def rounded(self) -> Rounded:
        """Return the changes; there must be at least one token."""
        latents, codebook, both = (self._figures(name) for name in _WHAT)
        if self._rounded is None:
            return Rounded(latents=latents, codebook=None, both=None)
        return Rounded(latents=latents, codebook=codebook, both=both)

    def _figures(self, name: str) -> Changed:
        tokens, lost, *indices = self._changed[name].tolist()
        return Changed(tokens=tokens, share=tokens / self._tokens, indices=tuple(indices), lost=lost)


def _round(quantizer: Quantizer, frozen: FrozenQuantizer, dtype: torch.dtype) -> FrozenQuantizer | None:
    """Return the frozen form with rounded parameters; `frozen` if rounding changes none; None if one overflows."""
    rounded = copy.deepcopy(quantizer)
    is_same = True
    for parameter in rounded.parameters():
        values = narrow(parameter.data, dtype).to(parameter.dtype)
        is_same = is_same and torch.equal(values, parameter.data)
        parameter.data = values
    if is_same:
        return frozen
    try:
        return freeze(rounded, device=frozen.device)
    except CodebookError:
        return None


def _indices(frozen: FrozenQuantizer, rows: Tensor) -> Tensor:
    """Return the indices (n, q) of rows (n, C); -1 for a row that cannot be encoded."""
    found = torch.full((len(rows), frozen.num_quantizers), -1, dtype=torch.int64, device=rows.device)
    is_finite = torch.isfinite(rows).all(dim=1)
    if not bool(is_finite.all()):
        found[is_finite] = _indices(frozen, rows[is_finite])
        return found
    try:
        return frozen.encode_rows(rows).reshape(found.shape)
    except NonFiniteLatents:
        if len(rows) == 1:
            return found
    # The projection of at least one row overflows float32. Such rows are rare, so bisection finds them quickly.
    half = len(rows) // 2
    return torch.cat([_indices(frozen, rows[:half]), _indices(frozen, rows[half:])])
