"""Samples the rows that a server encodes, and counts which codes they got, and with what error.

Every row has the same probability to be sampled, whoever sent it, in whatever batch and place, and whatever happens to
other rows: so the counts are unbiased. Sampled rows are copied after the replies are sent, and counted many at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vqserve_server.code_groups import CodeGroups, Ints
from vqserve_server.usage.memory import Block, BlockText, UsageMemory

if TYPE_CHECKING:
    from vqserve_server.tokenizer import Tokenizer

Rows = npt.NDArray[np.floating[Any]]

# Sampled rows that are counted at once, in at most so many bytes; and how long they wait for more.
_MOST_KEPT, _MOST_KEPT_BYTES = 1024, 1 << 20
_LONGEST_WAIT_S = 1.0
# Rows of a full half of the window: several for each code, so that those in use are seen; less is too little for any.
_ROWS_PER_CODE, _LEAST_WINDOW_ROWS, _MOST_WINDOW_ROWS = 4, 1 << 14, 1 << 20
_GAPS_AT_ONCE = 4096


class RowSampler:
    """Chooses rows of a stream of batches: each with the same probability, independently of all others."""

    def __init__(self, one_in: int, rng: np.random.Generator) -> None:
        """Choose one row in `one_in` on average."""
        self._gaps = _gaps(one_in, rng)
        self._next = next(self._gaps) - 1

    def choose(self, rows: int) -> list[int]:
        """Return the chosen ones, ascending, of the next rows of the stream; most often none."""
        if self._next >= rows:
            self._next -= rows
            return []
        chosen = []
        position = self._next
        while position < rows:
            chosen.append(position)
            position += next(self._gaps)
        self._next = position - rows
        return chosen


def _gaps(one_in: int, rng: np.random.Generator) -> Iterator[int]:
    """Yield the distances from one chosen row to the next."""
    while True:
        yield from rng.geometric(1 / one_in, _GAPS_AT_ONCE).tolist()


def window_rows(groups: CodeGroups) -> int:
    """Return the rows of a full half of a codebook's window."""
    largest = max(int(stage.stop) - int(stage.start) for stage in groups.stages)
    return min(max(_ROWS_PER_CODE * largest, _LEAST_WINDOW_ROWS), _MOST_WINDOW_ROWS)


class CodebookUsage:
    """The sampled rows of one codebook. Safe for use by many threads."""

    def __init__(self, tokenizer: Tokenizer, block: Block) -> None:
        """Count in a block; the numbers that are there stay."""
        self._tokenizer = tokenizer
        self._block: Block | None = block
        self._lock = threading.Lock()
        self._groups = block.text.groups
        self._window_rows = window_rows(self._groups)
        self._most_kept = max(1, min(_MOST_KEPT, _MOST_KEPT_BYTES // (8 * tokenizer.info.input_dim)))
        # Rows and indices that are not counted yet, by the number of indices that the callers wanted.
        self._kept: dict[int, list[tuple[Rows, Ints]]] = {}
        self._num_kept = 0
        self._counted_at = time.monotonic()
        self._statistics = tokenizer.statistics
        self._compare(block)

    def use_statistics(self) -> None:
        """Compare with the statistics that the tokenizer has now."""
        with self._lock:
            if self._block is not None and self._tokenizer.statistics is not self._statistics:
                self._statistics = self._tokenizer.statistics
                self._compare(self._block)

    def close(self) -> None:
        """Count no more; when this returns, nothing writes to the block."""
        with self._lock:
            self._block = None

    def record(self, rows: Rows, indices: Ints) -> None:
        """Take sampled rows; see `LiveUsage.record`."""
        with self._lock:
            if self._block is None:
                return
            self._kept.setdefault(indices.shape[1] if indices.ndim > 1 else 1, []).append((rows, indices))
            self._num_kept += len(rows)
            if self._num_kept >= self._most_kept or time.monotonic() - self._counted_at > _LONGEST_WAIT_S:
                self._count(self._block)

    def _compare(self, block: Block) -> None:
        statistics = self._statistics
        if statistics is None:
            block.set_reference(0, None, None)
        else:
            block.set_reference(statistics.rows, statistics.usage, statistics.error)

    def _count(self, block: Block) -> None:
        """Count the rows that are kept."""
        kept, self._kept, self._num_kept = self._kept, {}, 0
        self._counted_at = time.monotonic()
        for stages, parts in kept.items():
            rows = np.concatenate([part for part, _ in parts])
            indices = np.concatenate([part for _, part in parts]).reshape(len(rows), stages)
            errors = np.empty(0)
            if self._tokenizer.errors is not None and stages == self._tokenizer.info.num_quantizers:
                errors = self._tokenizer.errors.of(rows, indices)
                errors = errors[np.isfinite(errors)]
            places = self._groups.places(indices).ravel()
            block.add(places, errors, rows=len(rows), window_rows=self._window_rows)


class LiveUsage:
    """The samples of all codebooks that a process serves, in memory that other processes can read."""

    def __init__(self, memory: memoryview, *, one_in: int, seed: int | None = None) -> None:
        """Sample nothing yet.

        Args:
            memory: zeroed, or left by an earlier process of the same kind.
            one_in: one row in so many is sampled.
            seed: of the choice; None: another one each time.
        """
        self._memory = UsageMemory(memory)
        self._one_in = one_in
        self._rng = np.random.default_rng(seed)
        self._usages: dict[Tokenizer, CodebookUsage] = {}

    def follow(self, tokenizers: Iterable[Tokenizer]) -> None:
        """Sample these codebooks from now on, and no others.

        A codebook that has been sampled under the same name and with the same digest goes on; one with another digest
        starts anew.
        """
        served = list(tokenizers)
        before = self._usages
        # Device threads read it without a lock. What they still sample ends before its memory is used for others.
        self._usages = {each: before[each] for each in served if each in before}
        for tokenizer, usage in before.items():
            if tokenizer not in self._usages:
                usage.close()
        self._memory.keep({tokenizer.info.name for tokenizer in served})
        usages: dict[Tokenizer, CodebookUsage] = {}
        for tokenizer in served:
            if tokenizer in self._usages:
                usages[tokenizer] = self._usages[tokenizer]
                usages[tokenizer].use_statistics()
            elif (block := self._memory.block(_text(tokenizer))) is not None:
                usages[tokenizer] = CodebookUsage(tokenizer, block)
        self._usages = usages

    def sampler(self) -> RowSampler:
        """Return what chooses the rows of the batches of one device thread."""
        return RowSampler(self._one_in, self._rng.spawn(1)[0])

    def record(self, tokenizer: Tokenizer, rows: Rows, indices: Ints) -> None:
        """Take rows that a `sampler` has chosen.

        Args:
            tokenizer: has encoded them.
            rows: (n, input_dim) float32 or float64, n at least 1.
            indices: (n,) or (n, q) of the first q stages.
        """
        usage = self._usages.get(tokenizer)
        if usage is not None:
            usage.record(rows, indices)

    def forget(self, tokenizer: Tokenizer) -> None:
        """Sample a codebook no longer, after an error."""
        self._usages = {each: usage for each, usage in self._usages.items() if each is not tokenizer}


def _text(tokenizer: Tokenizer) -> BlockText:
    info = tokenizer.info
    return BlockText(info.name, info.digest, info.kind, tokenizer.code_groups.sizes)
