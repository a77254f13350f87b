"""Fit of a codebook to latents: usage of the codes, quantization error, effect of rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vqserve.errors import InvalidShape
from vqserve_server.quantizers import FrozenQuantizer, Quantizer, freeze
from vqserve_server.quantizers.comparison import Comparison
from vqserve_server.search import SearchCounts
from vqserve_tools.inspection.error import ErrorTally, QuantizationError, stages_to_compare
from vqserve_tools.inspection.rounding import DTYPES, Rounded, RoundingTally
from vqserve_tools.latents.rows import Description, LatentRows
from vqserve_tools.progress import progress_of

Ints = npt.NDArray[np.int64]

_ELEMENTS_AT_ONCE = 1 << 22
_MOST_ROWS_AT_ONCE = 1 << 16
# Up to this number of codes each code has a counter. Scalar quantizers can have 2^32 codes, most of them unused.
_MOST_COUNTERS = 1 << 22
_MOST_PENDING = 1 << 20


@dataclass(frozen=True, kw_only=True)
class UsageBin:
    """Number of codes that have `least` to `most` tokens."""

    least: int
    most: int
    codes: int


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Distribution of the tokens over the codes.

    Attributes:
        codes: number of codes that a token can have.
        used: number of codes that at least one token has.
        dead: number of the other codes.
        bits: entropy of the distribution, at most log2(codes).
        perplexity: 2^bits, the number of equally used codes with the same entropy.
        share: perplexity / codes.
        largest_share: fraction of the tokens that have the most used code.
        histogram: codes by number of tokens: 0, 1, 2 to 3, 4 to 7 and so on, up to the most used code.
    """

    codes: int
    used: int
    dead: int
    bits: float
    perplexity: float
    share: float
    largest_share: float
    histogram: tuple[UsageBin, ...]

    @classmethod
    def of(cls, counts: Ints, num_codes: int) -> Usage:
        """Return the figures from the token counts of all used codes; there must be at least one."""
        shares = counts / counts.sum()
        # abs: with one used code the sum is -0.
        bits = float(abs((shares * np.log2(shares)).sum()))
        exponents = np.bincount(np.frexp(counts)[1] - 1)
        dead = num_codes - counts.size
        powers = (UsageBin(least=1 << k, most=(2 << k) - 1, codes=int(n)) for k, n in enumerate(exponents))
        return cls(
            codes=num_codes,
            used=counts.size,
            dead=dead,
            bits=bits,
            perplexity=2.0**bits,
            share=2.0**bits / num_codes,
            largest_share=float(shares.max()),
            histogram=(UsageBin(least=0, most=0, codes=dead), *powers),
        )


class UsageTally:
    """Counts tokens by code."""

    def __init__(self, num_ids: int) -> None:
        """Start with no tokens; all ids are below `num_ids`."""
        self._dense = np.zeros(num_ids, np.int64) if num_ids <= _MOST_COUNTERS else None
        self._ids = self._counts = np.empty(0, np.int64)
        self._pending: list[Ints] = []

    def add(self, ids: Ints) -> None:
        """Count the tokens (n,) of these codes."""
        if self._dense is not None:
            np.add.at(self._dense, ids, 1)
            return
        self._pending.append(ids)
        # Merge when as many ids are pending as are known, so that each id is sorted only a few times.
        if sum(map(len, self._pending)) >= max(_MOST_PENDING, self._ids.size):
            self._merge()

    def counts(self) -> Ints:
        """Return the token counts of the used codes, in the order of their ids."""
        if self._dense is not None:
            return self._dense[self._dense > 0]
        self._merge()
        return self._counts

    def _merge(self) -> None:
        new, counts = np.unique(np.concatenate([np.empty(0, np.int64), *self._pending]), return_counts=True)
        self._ids, place = np.unique(np.concatenate([self._ids, new]), return_inverse=True)
        total = np.zeros(self._ids.size, np.int64)
        np.add.at(total, place, np.concatenate([self._counts, counts]))
        self._counts = total
        self._pending = []


@dataclass(frozen=True, kw_only=True)
class Rechecked:
    """Precision that the exact search needed, for one index position of the tokens.

    Attributes:
        rows: number of rows searched.
        float64: number of rows that the fast pass could not decide.
        beyond_float64: number of rows that float64 could not decide either.
    """

    rows: int
    float64: int
    beyond_float64: int


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Figures of a codebook on latents. All are about the full codes, not about the ids of a remap.

    Attributes:
        latents: description of the latents.
        device: device of the computation.
        backend: search backend; "none" if the kind needs no search.
        usage: usage of the codes, for each index position.
        rechecked: precision that the search needed, for each index position; empty if the kind needs no search.
        outside_remap: number of tokens whose code is not in the remap; None if there is no remap, or if codes outside
            the remap cannot win.
        error: quantization error; None if codes do not approximate latents.
        rounded: changes caused by rounding, for "float16" and "bfloat16".
    """

    latents: Description
    device: str
    backend: str
    usage: tuple[Usage, ...]
    rechecked: tuple[Rechecked, ...]
    outside_remap: int | None
    error: QuantizationError | None
    rounded: dict[str, Rounded]


class FitTally:
    """Encodes latents chunk by chunk, and accumulates the figures.

    Attributes:
        rows_at_once: number of tokens of a chunk.
        usage: usage of the codes, for each index position.
        error: quantization error; None if codes do not approximate latents.
    """

    def __init__(self, quantizer: Quantizer, frozen: FrozenQuantizer) -> None:
        """Start with no tokens, for a quantizer and its frozen form."""
        self._in_remap: npt.NDArray[np.bool_] | None = None
        quantizer, used = quantizer.without_remap()
        if used is not None:
            self._in_remap = np.zeros(quantizer.num_codes, bool)
            self._in_remap[used.cpu().numpy()] = True
            frozen = freeze(quantizer, device=frozen.device)
        widest = max(frozen.input_dim, frozen.code_dim, frozen.output_dim)
        self.rows_at_once = max(1, min(_MOST_ROWS_AT_ONCE, _ELEMENTS_AT_ONCE // widest))
        count = frozen.num_quantizers
        self._num_codes = quantizer.stage_vocab_sizes or (quantizer.num_reachable,) * count
        self.usage = [UsageTally(frozen.decodable) for _ in range(count)]
        self._searches = [SearchCounts() for _ in range(count)]
        self._frozen = frozen.counting(self._searches)
        self._comparison = Comparison(quantizer, frozen) if quantizer.is_approximate else None
        self.error = None
        if self._comparison is not None:
            self.error = ErrorTally(self._comparison.name, stages_to_compare(count))
        self._rounding = {name: RoundingTally(quantizer, frozen, dtype) for name, dtype in DTYPES.items()}
        self._outside_remap = 0

    @torch.no_grad()
    def add(self, chunk: npt.NDArray[Any]) -> None:
        """Count tokens.

        Args:
            chunk: (n, C) float32 or float64, finite.

        Raises:
            NonFiniteLatents: the projection of a token overflows float32.
        """
        rows = torch.from_numpy(chunk).to(self._frozen.device)
        found = self._frozen.encode_rows(rows)
        indices = found.reshape(len(rows), -1)
        for place, tally in enumerate(self.usage):
            ids = indices[:, place].cpu().numpy()
            tally.add(ids)
            if self._in_remap is not None:
                self._outside_remap += int(np.count_nonzero(~self._in_remap[ids]))
        if self._comparison is not None and self.error is not None:
            firsts = [found if found.ndim == 1 else found[:, :count] for count in self.error.stages]
            self.error.add(self._comparison.wanted(rows), [self._comparison.found(first) for first in firsts])
        for rounding in self._rounding.values():
            rounding.add(rows, indices)

    def fit(self, rows: LatentRows) -> Fit:
        """Return the figures of these latents, after all of them were added."""
        frozen = self._frozen
        is_searched = frozen.search_backend != "none"
        return Fit(
            latents=rows.describe(),
            device=str(frozen.device),
            backend=frozen.search_backend,
            usage=tuple(
                Usage.of(tally.counts(), size) for tally, size in zip(self.usage, self._num_codes, strict=True)
            ),
            rechecked=tuple(
                Rechecked(rows=counts.rows, float64=counts.rechecked, beyond_float64=counts.arbitrated)
                for counts in self._searches
                if is_searched
            ),
            outside_remap=None if self._in_remap is None else self._outside_remap,
            error=None if self.error is None else self.error.error(),
            rounded={name: rounding.rounded() for name, rounding in self._rounding.items()},
        )


def check_latents(rows: LatentRows, quantizer: Quantizer) -> None:
    """Check that the quantizer can encode these latents, in one pass over them.

    Raises:
        InvalidShape: another channel count, or no tokens.
        NonFiniteLatents: NaN or infinity; names the first one's position.
    """
    rows.check_channels(quantizer.input_dim)
    # A data set has at least one, or it cannot be read.
    if len(rows) == 0:
        raise InvalidShape(f"latents of shape {rows.describe().shape} hold no tokens", array="latents")
    rows.check_finite()


def measure_fit(tally: FitTally, rows: LatentRows, *, progress: bool = False) -> Fit:
    """Add all rows, and return the figures.

    Args:
        tally: new tally without tokens.
        rows: latents that passed `check_latents`.
        progress: whether to show progress on stderr.

    Raises:
        TokenBeyondRange: a token leaves float32's range on its way to the codes; names it.
    """
    done = 0
    with progress_of("encoding", len(rows), "token", shown=progress) as bar:
        for chunk in rows.chunks(tally.rows_at_once):
            with rows.placed(done):
                tally.add(chunk)
            done += len(chunk)
            bar.update(len(chunk))
    return tally.fit(rows)
