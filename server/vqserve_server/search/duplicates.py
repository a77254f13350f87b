"""Equal codes merged, so that exact ties between them cost nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from vqserve_server.search.searcher import SearchCounts, Searcher


class MergedSearcher(Searcher):
    """A searcher over distinct codes that answers with the lowest index of each."""

    def __init__(self, distinct: Searcher, lowest_index: Tensor) -> None:
        """Take a searcher over U distinct codes and the (U,) index in the codebook of the first of each."""
        self._distinct = distinct
        self._lowest_index = lowest_index
        self.backend = distinct.backend

    def search(self, rows: Tensor, counts: SearchCounts | None = None) -> Tensor:
        """Return the winning code of every row; see `Searcher.search`."""
        return self._lowest_index[self._distinct.search(rows, counts)]


def first_of_equals(codes: Tensor, bias: Tensor | None) -> Tensor | None:
    """Return the (U,) ascending indices of the codes that equal no earlier one; None if all differ.

    Under DOT two codes are equal when their biases are too. -0.0 equals 0.0.
    """
    columns = codes if bias is None else torch.cat([codes, bias[:, None].to(codes.dtype)], dim=1)
    bits = columns.detach().contiguous().view(torch.int32 if columns.dtype == torch.float32 else torch.int64)
    # -0.0 becomes 0.0, so that equal numbers have equal bits.
    bits = torch.where(bits == torch.iinfo(bits.dtype).min, 0, bits)
    # Equal codes have equal hashes, so a codebook whose hashes all differ (nearly every one) has no equal codes.
    generator = torch.Generator("cpu").manual_seed(0x5EED)
    weights = torch.randint(-(2**62), 2**62, (bits.shape[1],), generator=generator, device="cpu").to(bits.device)
    hashes = torch.zeros(bits.shape[0], dtype=torch.int64, device=bits.device)
    for column in range(bits.shape[1]):
        hashes += (bits[:, column].to(torch.int64) ^ weights[column]) * (2 * weights[column] + 1)
    if torch.unique(hashes).numel() == bits.shape[0]:
        return None
    _, group = torch.unique(bits, dim=0, return_inverse=True)
    positions = torch.arange(bits.shape[0], device=bits.device)
    first = torch.full_like(positions, bits.shape[0]).scatter_reduce_(0, group, positions, "amin")
    kept = first[first < bits.shape[0]].sort().values
    return None if kept.numel() == bits.shape[0] else kept
