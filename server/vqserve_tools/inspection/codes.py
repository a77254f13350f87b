"""The codes of one codebook: lengths, distances, duplicates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqserve_server.codebooks import Codebook
from vqserve_server.quantizers import AbstractQuantizer, CosineQuantizer, Quantizer, ResidualQuantizer
from vqserve_server.search import prepare
from vqserve_tools.progress import Progress, progress_of

# Tokens a batch, on the EMA's average. A code that is met once in some hundred batches lies above.
_DEAD_CLUSTER_SIZE = 0.01
_ELEMENTS_PER_CHUNK = 1 << 22
# Of so few codes each is compared with each.
_FEW = 256
# What may be computed, some ten seconds on two cores; where all codes would take more, some are drawn. Products of the
# searches, and elements that are prepared for one search after the other.
_MOST_PRODUCTS = 1 << 39
_MOST_ELEMENTS = 1 << 22
# Kinds whose codes start within [-1/K, 1/K].
_UNIFORM_AT_FIRST = frozenset({"vq", "vq_projection"})


@dataclass(frozen=True, eq=False)
class Codes:
    """What was measured of one codebook.

    Attributes:
        norms: (K,) Euclidean lengths of the code rows.
        neighbours: (S,) distances from the codes that were drawn, all if they are few enough, to the nearest other
            one; infinite where there is no other.
        duplicates: codes that equal an earlier one.
    """

    norms: npt.NDArray[np.float64]
    neighbours: npt.NDArray[np.float64]
    duplicates: int


def codebooks_of(quantizer: Quantizer) -> list[AbstractQuantizer]:
    """Return the codebooks of a quantizer, one for each of a token's indices; none where codes are computed."""
    if isinstance(quantizer, ResidualQuantizer):
        return quantizer.codebooks()
    return [quantizer] if isinstance(quantizer, AbstractQuantizer) else []


@torch.no_grad()
def measure_codes(codebooks: Sequence[AbstractQuantizer], *, progress: bool = False) -> list[Codes]:
    """Return what there is to know of each codebook; on the CPU.

    Args:
        codebooks: with finite codes.
        progress: tell on stderr how far it is.
    """
    rows = [codebook.code_rows() for codebook in codebooks]
    drawn = [draw_codes(*codes.shape) for codes in rows]
    measured = []
    with progress_of("measuring codes", sum(map(len, drawn)), "code", shown=progress) as told:
        for codebook, codes, chosen in zip(codebooks, rows, drawn, strict=True):
            # How long a code is makes no difference to a cosine.
            points = codebook.search_problem().codes if isinstance(codebook, CosineQuantizer) else codes
            distances = nearest_other(points, chosen, told)
            measured.append(Codes(_norms(codes.numpy()), distances, count_duplicates(codes.numpy())))
    return measured


def count_duplicates(codes: npt.NDArray[np.floating[Any]]) -> int:
    """Return how many rows equal an earlier one, zeros of either sign being equal."""
    # Sorted as bytes, which must then be equal where the numbers are.
    plain = np.ascontiguousarray(codes + codes.dtype.type(0))
    rows = plain.view(np.dtype((np.void, plain.shape[1] * plain.itemsize))).reshape(-1)
    return int(rows.size - np.unique(rows).size)


def count_dead_looking(codebook: Codebook) -> tuple[int | None, str]:
    """Return how many codes training seems never to have moved or met, None where nothing tells, and how it is told."""
    quantizer = codebook.quantizer
    if codebook.kind == "ema":
        cluster_size = quantizer.state_dict()["embedding.cluster_size"].numpy()
        return int(np.count_nonzero(cluster_size < _DEAD_CLUSTER_SIZE)), f"cluster size below {_DEAD_CLUSTER_SIZE}"
    if codebook.kind not in _UNIFORM_AT_FIRST or not isinstance(quantizer, AbstractQuantizer):
        return None, f"nothing tells in a codebook of kind {codebook.kind}"
    if codebook.arguments["embedding_weight_norm"]:
        return None, "a weight-normed codebook starts normal: nothing tells"
    codes = quantizer.code_rows().numpy()
    # As the initialiser rounds it.
    bound = codes.dtype.type(1 / codes.shape[0])
    inside = sum(int(np.count_nonzero(np.abs(chunk).max(axis=1) <= bound)) for chunk in _chunks(codes))
    return inside, "still within the initial range [-1/K, 1/K]"


def draw_codes(num_codes: int, dim: int) -> Tensor:
    """Return which codes of a codebook (K, D) are to be measured, ascending (S,): all, unless that takes too long.

    The same ones every time.
    """
    affordable = max(_FEW, min(_MOST_PRODUCTS // (num_codes * dim), _MOST_ELEMENTS // dim))
    if num_codes <= affordable:
        return torch.arange(num_codes)
    drawn = np.random.default_rng(0).choice(num_codes, affordable, replace=False, shuffle=False)
    return torch.from_numpy(np.sort(drawn))


def nearest_other(codes: Tensor, drawn: Tensor, told: Progress) -> npt.NDArray[np.float64]:
    """Return the distances from codes to their nearest other one: zero where a code has an equal.

    Found by the exact search, of which a code is to be kept from finding itself: the drawn codes search all others,
    and then each half of them the other half, each quarter the other quarter of its half, and so on.

    Args:
        codes: (K, D) float32 or float64 on the CPU, finite.
        drawn: (S,) ascending positions of the codes to measure.
        told: of the codes that are done.

    Returns:
        (S,) Euclidean, of the nearest of all K - 1 others; infinite where there is no other.
    """
    rows = codes[drawn]
    squares = torch.full((len(rows),), torch.inf, dtype=torch.float64)
    if len(rows) < len(codes):
        is_other = torch.ones(len(codes), dtype=torch.bool)
        is_other[drawn] = False
        squares = _to_nearest(rows, codes[is_other])
    return torch.minimum(squares, _among(rows, told)).sqrt().numpy()


def _among(rows: Tensor, told: Progress) -> Tensor:
    """Return the squared distance of each row (n, D) to the nearest other one (n,)."""
    if len(rows) <= _FEW:
        wide = rows.double()
        # From the differences: products would cancel.
        distances = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
        told.update(len(rows))
        return distances.amin(dim=1).square()
    half = len(rows) // 2
    left, right = rows[:half], rows[half:]
    inside = torch.cat([_among(left, told), _among(right, told)])
    across = torch.cat([_to_nearest(left, right), _to_nearest(right, left)])
    return torch.minimum(inside, across)


def _to_nearest(rows: Tensor, codes: Tensor) -> Tensor:
    """Return the squared distance (n,) float64 of each row (n, D) to the nearest of codes (K, D)."""
    winners = prepare(codes).search(rows)
    step = max(1, _ELEMENTS_PER_CHUNK // rows.shape[1])
    chunks = zip(torch.split(rows, step), torch.split(winners, step), strict=True)
    return torch.cat([(some.double() - codes[won].double()).square().sum(dim=1) for some, won in chunks])


def _norms(codes: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    with np.errstate(over="ignore"):
        return np.concatenate([np.linalg.norm(chunk.astype(np.float64), axis=1) for chunk in _chunks(codes)])


def _chunks(codes: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    step = max(1, _ELEMENTS_PER_CHUNK // codes.shape[1])
    return (codes[start : start + step] for start in range(0, codes.shape[0], step))
