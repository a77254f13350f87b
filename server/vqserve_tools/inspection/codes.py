"""Measurements of the codes of a codebook: norms, distances, duplicates, dead codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqserve_server.codebooks import Codebook
from vqserve_server.quantizers import AbstractQuantizer
from vqserve_server.search import prepare
from vqserve_tools.progress import Progress, progress_of

# Tokens per batch in the running average. A code that gets one token in about a hundred batches has more.
_DEAD_CLUSTER_SIZE = 0.01
_ELEMENTS_PER_CHUNK = 1 << 22
# Up to this number of codes, every pair is compared.
_FEW = 256
# Limits of the work, about ten seconds on two cores: products in all searches, and elements that are prepared for them.
# If all codes would exceed a limit, a sample of them is measured.
_MOST_PRODUCTS = 1 << 39
_MOST_ELEMENTS = 1 << 22


@dataclass(frozen=True, eq=False)
class Codes:
    """Measurements of one codebook.

    Attributes:
        norms: (K,) Euclidean norms of the code rows.
        neighbours: (S,) distance from each sampled code to the nearest other code; infinite if there is no other code.
            All codes are sampled unless there are too many.
        duplicates: number of codes that equal an earlier code.
    """

    norms: npt.NDArray[np.float64]
    neighbours: npt.NDArray[np.float64]
    duplicates: int


@torch.no_grad()
def measure_codes(codebooks: Sequence[AbstractQuantizer], *, progress: bool = False) -> list[Codes]:
    """Measure each codebook, on the CPU.

    Args:
        codebooks: codebooks with finite codes.
        progress: whether to show progress on stderr.
    """
    rows = [codebook.code_rows() for codebook in codebooks]
    drawn = [draw_codes(*codes.shape) for codes in rows]
    measured = []
    with progress_of("measuring codes", sum(map(len, drawn)), "code", shown=progress) as bar:
        for codebook, codes, chosen in zip(codebooks, rows, drawn, strict=True):
            # By directions the length of a code has no effect.
            points = codebook.search_problem().codes if codebook.code_space == "directions" else codes
            distances = nearest_other(points, chosen, bar)
            measured.append(Codes(_norms(codes.numpy()), distances, count_duplicates(codes.numpy())))
    return measured


def count_duplicates(codes: npt.NDArray[np.floating[Any]]) -> int:
    """Return the number of rows that equal an earlier row; -0.0 equals 0.0."""
    # The rows are compared as bytes. Adding zero turns -0.0 into 0.0, so that equal numbers have equal bytes.
    plain = np.ascontiguousarray(codes + codes.dtype.type(0))
    rows = plain.view(np.dtype((np.void, plain.shape[1] * plain.itemsize))).reshape(-1)
    return int(rows.size - np.unique(rows).size)


def count_dead_looking(codebook: Codebook) -> tuple[int | None, str]:
    """Return the number of codes that training seems never to have used, or None if unknown; and the criterion."""
    unknown = None, f"a codebook of kind {codebook.kind} has no sign of it"
    if codebook.quantizer.codebooks() != [codebook.quantizer]:
        return unknown
    [quantizer] = codebook.quantizer.codebooks()
    cluster_sizes, initial_bound = quantizer.cluster_sizes(), quantizer.initial_bound()
    if cluster_sizes is not None:
        dead = np.count_nonzero(cluster_sizes.numpy() < _DEAD_CLUSTER_SIZE)
        return int(dead), f"cluster size below {_DEAD_CLUSTER_SIZE}"
    if codebook.arguments.get("embedding_weight_norm"):
        return None, "a weight-normed codebook has no sign of it"
    if initial_bound is None:
        return unknown
    codes = quantizer.code_rows().numpy()
    # Rounded as the initialiser rounds it.
    bound = codes.dtype.type(initial_bound)
    inside = sum(int(np.count_nonzero(np.abs(chunk).max(axis=1) <= bound)) for chunk in _chunks(codes))
    return inside, "still within the initial range [-1/K, 1/K]"


def draw_codes(num_codes: int, dim: int) -> Tensor:
    """Return the codes of a codebook (K, D) to measure, ascending (S,): all, or a sample if all take too long.

    The sample is the same in every call.
    """
    affordable = max(_FEW, min(_MOST_PRODUCTS // (num_codes * dim), _MOST_ELEMENTS // dim))
    if num_codes <= affordable:
        return torch.arange(num_codes)
    drawn = np.random.default_rng(0).choice(num_codes, affordable, replace=False, shuffle=False)
    return torch.from_numpy(np.sort(drawn))


def nearest_other(codes: Tensor, drawn: Tensor, bar: Progress) -> npt.NDArray[np.float64]:
    """Return the distance from each sampled code to the nearest other code; zero for a duplicate.

    This uses the exact search, which must not find the code itself. So the sampled codes search all codes outside the
    sample; then each half of the sample searches the other half, each quarter the other quarter of its half, and so on.

    Args:
        codes: (K, D) float32 or float64 on the CPU, finite.
        drawn: (S,) ascending positions of the codes to measure.
        bar: receives the number of finished codes.

    Returns:
        (S,) Euclidean distance to the nearest of all K - 1 other codes; infinite if there is none.
    """
    rows = codes[drawn]
    squares = torch.full((len(rows),), torch.inf, dtype=torch.float64)
    if len(rows) < len(codes):
        is_other = torch.ones(len(codes), dtype=torch.bool)
        is_other[drawn] = False
        squares = _to_nearest(rows, codes[is_other])
    return torch.minimum(squares, _among(rows, bar)).sqrt().numpy()


def _among(rows: Tensor, bar: Progress) -> Tensor:
    """Return the squared distance (n,) of each row (n, D) to the nearest other row."""
    if len(rows) <= _FEW:
        wide = rows.double()
        # Computed from differences, because products would cancel.
        distances = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
        bar.update(len(rows))
        return distances.amin(dim=1).square()
    half = len(rows) // 2
    left, right = rows[:half], rows[half:]
    inside = torch.cat([_among(left, bar), _among(right, bar)])
    across = torch.cat([_to_nearest(left, right), _to_nearest(right, left)])
    return torch.minimum(inside, across)


def _to_nearest(rows: Tensor, codes: Tensor) -> Tensor:
    """Return the squared distance (n,) float64 of each row (n, D) to the nearest of codes (K, D)."""
    winners = prepare(codes).search(rows)
    step = max(1, _ELEMENTS_PER_CHUNK // rows.shape[1])
    chunks = zip(torch.split(rows, step), torch.split(winners, step), strict=True)
    return torch.cat([(part.double() - codes[won].double()).square().sum(dim=1) for part, won in chunks])


def _norms(codes: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    with np.errstate(over="ignore"):
        return np.concatenate([np.linalg.norm(chunk.astype(np.float64), axis=1) for chunk in _chunks(codes)])


def _chunks(codes: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    step = max(1, _ELEMENTS_PER_CHUNK // codes.shape[1])
    return (codes[start : start + step] for start in range(0, codes.shape[0], step))
