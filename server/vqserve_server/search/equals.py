"""Equal codes of a codebook: only the first of them can win, so that a search needs the others no more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]

# Elements of codes that are hashed at once: a codebook may be gigabytes.
_HASHED_ELEMENTS = 1 << 18


def first_of_equals(codes: Floats, bias: Floats | None = None) -> Ints | None:
    """Return the (U,) ascending indices of the codes that equal no earlier code, or None if all codes differ.

    With a bias, two codes are equal only if their biases are equal too. -0.0 equals 0.0.

    Args:
        codes: (K, D) float32 or float64.
        bias: (K,) float32 or float64.
    """
    # Equal codes have equal hashes: if all hashes differ, as in nearly every codebook, no codes are equal.
    parts = _parts(len(codes), codes.shape[1])
    hashes = np.concatenate([_hashes(_bits(codes, bias, part).astype(np.int64)) for part in parts])
    _, group, sizes = np.unique(hashes, return_inverse=True, return_counts=True)
    if len(sizes) == len(codes):
        return None
    suspects = np.nonzero(sizes[group] > 1)[0]
    _, firsts = np.unique(_bits(codes, bias, suspects), axis=0, return_index=True)
    is_first = np.ones(len(codes), bool)
    is_first[suspects] = False
    is_first[suspects[firsts]] = True
    return None if is_first.all() else np.nonzero(is_first)[0]


def first_of_equal_tensors(codes: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """Return what `first_of_equals` does, for tensors; from CUDA the codebook is not copied."""
    import torch  # noqa: PLC0415

    if codes.device.type == "cpu":
        firsts = first_of_equals(codes.detach().numpy(), None if bias is None else bias.detach().numpy())
        return None if firsts is None else torch.from_numpy(firsts)

    def bits(part: slice) -> Tensor:
        rows = codes[part] if bias is None else torch.cat([codes[part], bias[part, None].to(codes.dtype)], dim=1)
        patterns = rows.detach().contiguous().view(torch.int32 if rows.dtype == torch.float32 else torch.int64)
        return torch.where(patterns == torch.iinfo(patterns.dtype).min, 0, patterns)

    hashes = torch.cat([_hashes(bits(part).long()) for part in _parts(len(codes), codes.shape[1])])
    if torch.unique(hashes).numel() == len(codes):
        return None
    _, group = torch.unique(bits(slice(None)), dim=0, return_inverse=True)
    positions = torch.arange(len(codes), device=codes.device)
    first = torch.full_like(positions, len(codes)).scatter_reduce_(0, group, positions, "amin")
    kept = first[first < len(codes)].sort().values
    return None if kept.numel() == len(codes) else kept


def _parts(num_codes: int, width: int) -> list[slice]:
    step = max(1, _HASHED_ELEMENTS // width)
    return [slice(start, start + step) for start in range(0, num_codes, step)]


def _bits(codes: Floats, bias: Floats | None, part: slice | Ints) -> npt.NDArray[np.signedinteger[Any]]:
    """Return codes (n, D), and biases behind them, as integers that are equal exactly where the numbers are."""
    rows = codes[part] if bias is None else np.column_stack([codes[part], bias[part].astype(codes.dtype)])
    bits = np.ascontiguousarray(rows).view(f"i{rows.itemsize}")
    # -0.0 equals 0.0.
    return np.where(bits == np.iinfo(bits.dtype).min, 0, bits)


def _hashes(bits: Any) -> Any:
    """Return a hash of each row: (n,) int64 of (n, width) int64 bits, numpy's or torch's, all modulo 2^64."""
    weights = np.random.default_rng(0x5EED).integers(-(2**62), 2**62, bits.shape[1]).tolist()
    hashes = 0
    for column, weight in enumerate(weights):
        hashes = hashes + (bits[:, column] ^ weight) * (2 * weight + 1)
    return hashes
