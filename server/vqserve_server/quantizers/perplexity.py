"""How evenly codes are used."""

from __future__ import annotations

import torch
from torch import Tensor

from vqserve.errors import InvalidShape
from vqserve_server.quantizers.tensors import check_integers, check_size, checked_indices


@torch.no_grad()
def measure_perplexity(predicted_indices: Tensor, num_centroids: int) -> tuple[Tensor, Tensor]:
    """Return the perplexity of the codes' histogram and how many of them are in use.

    perplexity = exp(-sum_j p_j log(p_j + 1e-10)) with p = histogram / N: 1 where one code takes all, num_centroids
    where all are used evenly.

    Args:
        predicted_indices: full ids in [0, num_centroids), of any shape and integer type.
        num_centroids: K.

    Returns:
        perplexity, 0-dim float32, and codes in use, 0-dim int64, on the indices' device; no gradient. On a GPU nothing
        waits for the device, so that an id out of range cannot raise: it makes the perplexity NaN.

    Raises:
        InvalidDtype: the indices are not integers.
        InvalidShape: there are none.
        IndexOutOfRange: an id is not in [0, num_centroids), on the CPU.
    """
    check_size("num_centroids", num_centroids)
    check_integers(predicted_indices)
    if predicted_indices.numel() == 0:
        raise InvalidShape(f"indices of shape {tuple(predicted_indices.shape)} have no perplexity")
    if predicted_indices.device.type == "cpu":
        checked_indices(predicted_indices, num_centroids)
    ids = predicted_indices.reshape(-1).to(torch.int64)
    is_id = (ids >= 0) & (ids < num_centroids)
    counts = count_codes(torch.where(is_id, ids, num_centroids), num_centroids + 1)[:num_centroids]
    perplexity, in_use = perplexity_of_counts(counts, ids.numel(), torch.float32)
    return torch.where(is_id.all(), perplexity, torch.nan), in_use


def count_codes(ids: Tensor, num_codes: int) -> Tensor:
    """Return the histogram (num_codes,) int64 of ids (N,) int64, which must be in range (not checked).

    `torch.bincount` makes the host wait for a GPU, to read the largest id.
    """
    counts = torch.zeros(num_codes, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(0, ids, torch.ones_like(ids))


def perplexity_of_counts(counts: Tensor, num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return perplexity (0-dim of `dtype`) and codes in use (0-dim int64) of a histogram (K,) int64."""
    p = counts.to(dtype) / num_tokens
    return torch.exp(-(p * torch.log(p + 1e-10)).sum()), (counts > 0).sum()
