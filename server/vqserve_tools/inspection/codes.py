"""Measurements of the codes of a codebook: norms, distances, duplicates, dead codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vqserve_server.codebooks import Codebook
from vqserve_server.codebooks.kinds import KINDS
from vqserve_server.quantizers.declared import Metric
from vqserve_server.search import prepare_arrays
from vqserve_tools.progress import Progress, progress_of

Floats = npt.NDArray[np.floating[Any]]
Float64s = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# Tokens per batch in the running average. A code that gets one token in about a hundred batches has more.
_DEAD_CLUSTER_SIZE = 0.01
_ELEMENTS_PER_CHUNK = 1 << 22
# Up to this number of codes, every pair is compared.
_FEW = 256
# Limits of the work, about ten seconds on two cores: products in all searches, and elements that are prepared for them.
# If all codes would exceed a limit, a sample of them is measured.
_MOST_PRODUCTS = 1 << 39
_MOST_ELEMENTS = 1 << 22


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredCodes:
    """The codes of one codebook, and what is known of how they came about.

    Attributes:
        rows: (K, O) code rows that decode returns.
        points: (K, D) codes between which distances count: directions where the length of a code has no effect.
        metric: how they are searched; None: by no metric.
        cluster_sizes: (K,) moving average of tokens per batch and code; None: the kind has no average.
        initial_bound: b if the constructor draws codes within [-b, b]; None: initial values have no bound.
        is_stage: whether it is a stage of a residual codebook.
    """

    rows: Floats
    points: Floats
    metric: Metric | None
    cluster_sizes: Floats | None
    initial_bound: float | None
    is_stage: bool = False


def stored_codes(codebook: Codebook) -> list[StoredCodes]:
    """Return the codes of each stage; none where codes are computed. torch is imported unless the codebook is plain."""
    plain = codebook.state.plain(shares_memory=True)
    if plain is None:
        from vqserve_tools.inspection.stages import stored_codes_of_class  # noqa: PLC0415

        return stored_codes_of_class(codebook.quantizer)
    return [
        StoredCodes(
            rows=plain.code_rows,
            points=plain.codes if plain.space == "directions" else plain.code_rows,
            metric=KINDS[codebook.kind].metric,
            cluster_sizes=plain.cluster_sizes,
            initial_bound=plain.initial_bound,
        )
    ]


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


def measure_codes(stages: Sequence[StoredCodes], *, progress: bool = False) -> list[Codes]:
    """Measure the codebook of each stage, on the CPU.

    Args:
        stages: codebooks with finite codes.
        progress: whether to show progress on stderr.
    """
    drawn = [draw_codes(*stage.rows.shape) for stage in stages]
    measured = []
    with progress_of("measuring codes", sum(map(len, drawn)), "code", shown=progress) as bar:
        for stage, chosen in zip(stages, drawn, strict=True):
            distances = nearest_other(stage.points, chosen, bar)
            measured.append(Codes(_norms(stage.rows), distances, count_duplicates(stage.rows)))
    return measured


def count_duplicates(codes: npt.NDArray[np.floating[Any]]) -> int:
    """Return the number of rows that equal an earlier row; -0.0 equals 0.0."""
    # The rows are compared as bytes. Adding zero turns -0.0 into 0.0, so that equal numbers have equal bytes.
    plain = np.ascontiguousarray(codes + codes.dtype.type(0))
    rows = plain.view(np.dtype((np.void, plain.shape[1] * plain.itemsize))).reshape(-1)
    return int(rows.size - np.unique(rows).size)


def count_dead_looking(codebook: Codebook, stages: Sequence[StoredCodes]) -> tuple[int | None, str]:
    """Return the number of codes that training seems never to have used, or None if unknown; and the criterion."""
    unknown = None, f"a codebook of kind {codebook.kind} has no sign of it"
    if not stages or stages[0].is_stage:
        return unknown
    [stage] = stages
    if stage.cluster_sizes is not None:
        dead = int(np.count_nonzero(stage.cluster_sizes < _DEAD_CLUSTER_SIZE))
        return dead, f"cluster size below {_DEAD_CLUSTER_SIZE}"
    if codebook.arguments.get("embedding_weight_norm"):
        return None, "a weight-normed codebook has no sign of it"
    if stage.initial_bound is None:
        return unknown
    # Rounded as the initialiser rounds it.
    bound = stage.rows.dtype.type(stage.initial_bound)
    inside = sum(int(np.count_nonzero(np.abs(chunk).max(axis=1) <= bound)) for chunk in _chunks(stage.rows))
    return inside, "still within the initial range [-1/K, 1/K]"


def draw_codes(num_codes: int, dim: int) -> Ints:
    """Return the codes of a codebook (K, D) to measure, ascending (S,): all, or a sample if all take too long.

    The sample is the same in every call.
    """
    affordable = max(_FEW, min(_MOST_PRODUCTS // (num_codes * dim), _MOST_ELEMENTS // dim))
    if num_codes <= affordable:
        return np.arange(num_codes)
    drawn = np.random.default_rng(0).choice(num_codes, affordable, replace=False, shuffle=False)
    return np.sort(drawn)


def nearest_other(codes: Floats, drawn: Ints, bar: Progress) -> Float64s:
    """Return the distance from each sampled code to the nearest other code; zero for a duplicate.

    This uses the exact search, which must not find the code itself. So the sampled codes search all codes outside the
    sample; then each half of the sample searches the other half, each quarter the other quarter of its half, and so on.

    Args:
        codes: (K, D) float32 or float64, finite.
        drawn: (S,) ascending positions of the codes to measure.
        bar: receives the number of finished codes.

    Returns:
        (S,) Euclidean distance to the nearest of all K - 1 other codes; infinite if there is none.
    """
    rows = codes[drawn]
    squares = np.full(len(rows), np.inf)
    if len(rows) < len(codes):
        is_other = np.ones(len(codes), bool)
        is_other[drawn] = False
        squares = _to_nearest(rows, codes[is_other])
    distances: Float64s = np.sqrt(np.minimum(squares, _among(rows, bar)))
    return distances


def _among(rows: Floats, bar: Progress) -> Float64s:
    """Return the squared distance (n,) of each row (n, D) to the nearest other row."""
    if len(rows) <= _FEW:
        bar.update(len(rows))
        return _among_few(rows.astype(np.float64))
    half = len(rows) // 2
    left, right = rows[:half], rows[half:]
    inside = np.concatenate([_among(left, bar), _among(right, bar)])
    across = np.concatenate([_to_nearest(left, right), _to_nearest(right, left)])
    nearest: Float64s = np.minimum(inside, across)
    return nearest


def _among_few(rows: Float64s) -> Float64s:
    # Computed from differences, because products would cancel.
    squares = np.zeros((len(rows), len(rows)))
    differences = np.empty_like(squares)
    for column in rows.T:
        np.subtract.outer(column, column, out=differences)
        squares += np.square(differences, out=differences)
    np.fill_diagonal(squares, np.inf)
    nearest: Float64s = squares.min(axis=1)
    return nearest


def _to_nearest(rows: Floats, codes: Floats) -> Float64s:
    """Return the squared distance (n,) float64 of each row (n, D) to the nearest of codes (K, D)."""
    searcher = prepare_arrays(codes)
    if searcher is None:
        from vqserve_tools.inspection.stages import nearest_by_torch  # noqa: PLC0415

        winners = nearest_by_torch(rows, codes)
    else:
        winners = searcher.search(rows)
    squares = np.empty(len(rows))
    step = max(1, _ELEMENTS_PER_CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        squares[part] = np.square(rows[part].astype(np.float64) - codes[winners[part]]).sum(axis=1)
    return squares


def _norms(codes: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    with np.errstate(over="ignore"):
        return np.concatenate([np.linalg.norm(chunk.astype(np.float64), axis=1) for chunk in _chunks(codes)])


def _chunks(codes: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    step = max(1, _ELEMENTS_PER_CHUNK // codes.shape[1])
    return (codes[start : start + step] for start in range(0, codes.shape[0], step))
